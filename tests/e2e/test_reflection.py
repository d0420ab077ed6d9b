"""An independent client in another language, which knows nothing but gRPC's own reflection.

No generated stub and no file of proto/ is used here: the services are listed, their messages
described, built and read through server reflection, as grpcurl does it.
"""

import unittest

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import harness
import worker as workers

BLOCK_TOKENS = 4


FIELD = descriptor_pb2.FieldDescriptorProto
ONE, MANY = FIELD.LABEL_OPTIONAL, FIELD.LABEL_REPEATED
TEXT, RAW, SUB, I32 = FIELD.TYPE_STRING, FIELD.TYPE_BYTES, FIELD.TYPE_MESSAGE, FIELD.TYPE_INT32


def described(package, messages):
    """Message classes from {name: [(number, label, type, field[, its message]), ...]}."""
    file = descriptor_pb2.FileDescriptorProto(
        name=package + ".proto", package=package, syntax="proto3")
    for name, fields in messages.items():
        added = file.message_type.add(name=name)
        for number, label, kind, field_name, *type_name in fields:
            added.field.add(name=field_name, number=number, label=label, type=kind,
                            type_name=f".{package}.{type_name[0]}" if type_name else None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    factory = message_factory.MessageFactory(pool)
    return {name: factory.GetPrototype(pool.FindMessageTypeByName(f"{package}.{name}"))
            for name in messages}


# gRPC's own two services cannot describe themselves by reflection: as much of them as is asked.
REFLECTION = described("grpc.reflection.v1alpha", {
    "ServerReflectionRequest": [
        (1, ONE, TEXT, "host"), (3, ONE, TEXT, "file_by_filename"),
        (4, ONE, TEXT, "file_containing_symbol"), (7, ONE, TEXT, "list_services")],
    "FileDescriptorResponse": [(1, MANY, RAW, "file_descriptor_proto")],
    "ServiceResponse": [(1, ONE, TEXT, "name")],
    "ListServiceResponse": [(1, MANY, SUB, "service", "ServiceResponse")],
    "ErrorResponse": [(1, ONE, I32, "error_code"), (2, ONE, TEXT, "error_message")],
    "ServerReflectionResponse": [
        (1, ONE, TEXT, "valid_host"),
        (4, ONE, SUB, "file_descriptor_response", "FileDescriptorResponse"),
        (6, ONE, SUB, "list_services_response", "ListServiceResponse"),
        (7, ONE, SUB, "error_response", "ErrorResponse")],
})
HEALTH = described("grpc.health.v1", {
    "HealthCheckRequest": [(1, ONE, TEXT, "service")],
    "HealthCheckResponse": [(1, ONE, I32, "status")],
})
SERVING = 1


class ReflectedClient:
    """Calls methods by name with dictionaries of fields."""

    def __init__(self, address):
        self.channel = workers.connect(address)
        self.request = REFLECTION["ServerReflectionRequest"]
        self.ask = self.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=self.request.SerializeToString,
            response_deserializer=REFLECTION["ServerReflectionResponse"].FromString)
        self.pool = descriptor_pool.DescriptorPool()
        self.factory = message_factory.MessageFactory(self.pool)
        self.known = set()

    def reflect(self, **question):
        answer, = self.ask(iter([self.request(**question)]), timeout=workers.CALL_SECONDS)
        if answer.error_response.error_code:
            raise LookupError(answer.error_response.error_message)
        return answer

    def services(self):
        return [service.name
                for service in self.reflect(list_services="*").list_services_response.service]

    def learn(self, **question):
        """Adds a file to the pool, what it imports first."""
        files = [descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in
                 self.reflect(**question).file_descriptor_response.file_descriptor_proto]
        waiting = {file.name: file for file in files if file.name not in self.known}

        def add(file):
            self.known.add(file.name)
            for needed in file.dependency:
                if needed in self.known:
                    continue
                if needed in waiting:
                    add(waiting[needed])
                else:
                    self.learn(file_by_filename=needed)
            self.pool.Add(file)

        for file in list(waiting.values()):
            if file.name not in self.known:
                add(file)

    def method(self, name):
        service_name, method_name = name.split("/")
        try:
            service = self.pool.FindServiceByName(service_name)
        except KeyError:
            self.learn(file_containing_symbol=service_name)
            service = self.pool.FindServiceByName(service_name)
        return service.FindMethodByName(method_name)

    def call(self, name, **fields):
        """One answer, or the list of them for a method that streams."""
        method = self.method(name)
        request = self.factory.GetPrototype(method.input_type)(**fields)
        answer_type = self.factory.GetPrototype(method.output_type)
        as_proto = descriptor_pb2.MethodDescriptorProto()
        method.CopyToProto(as_proto)
        kind = self.channel.unary_stream if as_proto.server_streaming else self.channel.unary_unary
        answer = kind("/" + name, request_serializer=type(request).SerializeToString,
                      response_deserializer=answer_type.FromString)(
                          request, timeout=workers.CALL_SECONDS)
        return list(answer) if as_proto.server_streaming else answer


class Reflection(harness.LarderTest):

    def setUp(self):
        super().setUp()
        self.larderd = self.daemon()
        self.client = ReflectedClient(self.larderd.address)
        self.addCleanup(self.client.channel.close)

    def test_lists_its_services(self):
        services = self.client.services()
        for name in ("larder.v1.KvCache", "larder.v1.Inspector", "grpc.health.v1.Health",
                     "grpc.reflection.v1alpha.ServerReflection"):
            self.assertIn(name, services)

    def test_health(self):
        check = self.client.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HEALTH["HealthCheckRequest"].SerializeToString,
            response_deserializer=HEALTH["HealthCheckResponse"].FromString)

        def ask(service):
            return check(HEALTH["HealthCheckRequest"](service=service),
                         timeout=workers.CALL_SECONDS).status

        # The server as a whole, its services, and whether its NVMe tier takes writes.
        for service in ("", "larder.v1.KvCache", "larder.v1.Inspector", "larder.v1.Nvme"):
            self.assertEqual(ask(service), SERVING)
        with self.assertRaises(grpc.RpcError) as caught:
            ask("no.such.Service")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_opens_a_model_puts_looks_up_downloads_explains(self):
        call = self.client.call
        self.client.learn(file_containing_symbol="larder.v1.ModelSpec")
        bf16 = self.client.pool.FindEnumTypeByName("larder.v1.DType").values_by_name["DTYPE_BF16"]
        model = call("larder.v1.KvCache/OpenModel", spec=dict(
            name="reflected", layers=2, kv_heads=2, head_dim=64, dtype=bf16.number,
            block_tokens=BLOCK_TOKENS, shards=1))
        self.assertEqual(model.block_bytes, 2 * 2 * 2 * BLOCK_TOKENS * 64 * 2)
        self.assertEqual(len(model.fingerprint), 32)
        self.assertEqual(int.from_bytes(model.fingerprint[:8], "little"), model.model_id)

        tokens = list(range(100, 100 + 3 * BLOCK_TOKENS))
        data = b"".join(bytes([17 * i + 1]) * model.block_bytes for i in range(3))
        # Two blocks from the start, the third past the cached two; no session, no lease.
        state = call("larder.v1.KvCache/Put", model_id=model.model_id, position=0,
                     tokens=tokens[:2 * BLOCK_TOKENS], data=data[:2 * model.block_bytes])
        self.assertEqual((state.lease_id, state.end), (0, 2))
        state = call("larder.v1.KvCache/Put", model_id=model.model_id, position=2,
                     prefix=tokens[:2 * BLOCK_TOKENS], tokens=tokens[2 * BLOCK_TOKENS:],
                     data=data[2 * model.block_bytes:])
        self.assertEqual(state.end, 3)

        found = call("larder.v1.KvCache/LookupPrefix", model_id=model.model_id, peek=True,
                     tokens=tokens + [5, 6])
        self.assertEqual((found.lease_id, found.matched_tokens), (0, len(tokens)))

        got = bytearray(3 * model.block_bytes)
        for chunk in call("larder.v1.KvCache/Download",
                          blocks=dict(model_id=model.model_id, tokens=tokens)):
            at = chunk.position * model.block_bytes + chunk.offset
            got[at:at + len(chunk.data)] = chunk.data
        self.assertEqual(bytes(got), data)

        other = tokens[:BLOCK_TOKENS] + [9] * (2 * BLOCK_TOKENS + 1)
        why = call("larder.v1.Inspector/Explain", model_id=model.model_id, tokens=other)
        self.assertEqual((why.asked_blocks, why.matched_blocks, why.ignored_tail_tokens),
                         (3, 1, 1))
        self.assertEqual(sum(segment.blocks for segment in why.segments), 1)
        self.assertNotEqual(why.stopped_because, "")

    def test_sees_the_daemon(self):
        status = self.client.call("larder.v1.Inspector/GetStatus")
        self.assertEqual([tier.health for tier in status.tiers], ["OK", "OK", "OK"])
        self.assertNotEqual(status.boot_id, 0)
        self.assertEqual(len(self.client.call("larder.v1.Inspector/ListModels").models), 0)
        echo = self.client.call("larder.v1.Inspector/Echo", payload=b"abc", response_bytes=1000)
        self.assertEqual(len(echo.payload), 1000)


if __name__ == "__main__":
    unittest.main()
