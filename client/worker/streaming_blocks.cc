#include "client/worker/streaming_blocks.h"

#include "storage/check.h"

namespace larder::worker {

void StreamingBlocks::Grow(uint32_t tokens) {
  LARDER_CHECK(tokens % block_tokens_ == 0);
  const size_t kept = sink_blocks_ + window_blocks_;
  if (window_blocks_ > 0 && blocks_.size() > kept) {
    const size_t surplus = blocks_.size() - kept;
    const auto first = blocks_.begin() + sink_blocks_;
    blocks_.erase(first, first + surplus);
    table_.erase(table_.begin() + sink_blocks_, table_.begin() + sink_blocks_ + surplus);
    given_back_ += surplus;
  }
  position_ = static_cast<uint32_t>(blocks_.size()) * block_tokens_;
  for (uint32_t i = 0; i < tokens / block_tokens_; ++i) {
    blocks_.push_back(pool_.Take());
    table_.push_back(blocks_.back().get());
  }
}

}  // namespace larder::worker
