#!/usr/bin/env python3
"""Writes a multi-turn chat workload as a trace for `larder replay` and `larder simulate`.

A few assistants, each with a system prompt that all of its users share. Each user holds one
chat at a time; a turn sends the whole chat so far, some blocks longer than the turn before,
so its prompt begins with everything that was computed for it already. After some turns the
chat ends and the user begins another. Who speaks next is drawn in favour of those who spoke
lately, because people answer within minutes, or not at all.

One JSON object a line, in the order of arrival:
  {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}
Each id names one block of 512 tokens and everything before it. The same options and seed
give the same trace, byte for byte.
"""

import argparse
import dataclasses
import json
import random
import sys

BLOCK_TOKENS = 512


@dataclasses.dataclass
class Options:
    seed: int = 1
    requests: int = 2000
    assistants: int = 2
    users: int = 64
    system_blocks: int = 4
    first_blocks: int = 3  # of a chat's first message, at most
    turn_blocks: int = 2  # added by each later turn, at most
    turns: int = 12  # of a chat, at most


@dataclasses.dataclass
class Chat:
    ids: list
    turns_left: int


class Workload:
    """Yields requests; `ids` counts the blocks named so far."""

    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.ids = 0
        self.prompts = [self._new_ids(options.system_blocks) for _ in range(options.assistants)]
        self.chats = {}
        self.recent = list(range(options.users))  # most recent last

    def _new_ids(self, count):
        first, self.ids = self.ids, self.ids + count
        return list(range(first, self.ids))

    def _next_user(self):
        # Exponential over recency: half of the turns come from the latest third of the users.
        back = int(self.random.expovariate(2.0 / len(self.recent)))
        user = self.recent.pop(len(self.recent) - 1 - back % len(self.recent))
        self.recent.append(user)
        return user

    def _turn(self, user):
        options = self.options
        chat = self.chats.get(user)
        if chat is None:
            prompt = self.prompts[user % options.assistants]
            chat = Chat(list(prompt), self.random.randint(1, options.turns))
            self.chats[user] = chat
            grow = self.random.randint(1, options.first_blocks)
        else:
            grow = self.random.randint(1, options.turn_blocks)
        chat.ids += self._new_ids(grow)
        chat.turns_left -= 1
        if chat.turns_left == 0:
            del self.chats[user]
        return list(chat.ids)

    def __iter__(self):
        now_ms = 0
        for _ in range(self.options.requests):
            ids = self._turn(self._next_user())
            yield {
                "timestamp": now_ms,
                "input_length": len(ids) * BLOCK_TOKENS,
                "output_length": self.random.randint(20, 800),
                "hash_ids": ids,
            }
            now_ms += int(self.random.expovariate(1 / 400))


def parse_options(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Options):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default,
                            metavar="N", help=f"default {field.default}")
    options = Options(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        if field.name != "seed" and value < 1:
            parser.error(f"--{field.name.replace('_', '-')}: {value} is not at least 1")
    return options


def main():
    for request in Workload(parse_options(sys.argv[1:])):
        print(json.dumps(request))


if __name__ == "__main__":
    main()
