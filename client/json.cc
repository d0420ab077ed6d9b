#include "client/json.h"

#include <cstdint>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "client/names.h"
#include "client/output.h"
#include "google/protobuf/descriptor.h"

namespace larder::cli {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

bool IsId(const FieldDescriptor& field) {
  return field.type() == FieldDescriptor::TYPE_FIXED64 && absl::EndsWith(field.name(), "_id");
}

Json Text(const FieldDescriptor& field, const std::string& value) {
  return field.type() == FieldDescriptor::TYPE_BYTES ? absl::BytesToHexString(value) : value;
}

Json Unsigned64(const FieldDescriptor& field, uint64_t value) {
  return IsId(field) ? Json(FormatId(value)) : Json(value);
}

Json Single(const Message& message, const FieldDescriptor& field) {
  const Reflection& from = *message.GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return from.GetBool(message, &field);
    case FieldDescriptor::CPPTYPE_INT32:
      return from.GetInt32(message, &field);
    case FieldDescriptor::CPPTYPE_INT64:
      return from.GetInt64(message, &field);
    case FieldDescriptor::CPPTYPE_UINT32:
      return from.GetUInt32(message, &field);
    case FieldDescriptor::CPPTYPE_UINT64:
      return Unsigned64(field, from.GetUInt64(message, &field));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return from.GetFloat(message, &field);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return from.GetDouble(message, &field);
    case FieldDescriptor::CPPTYPE_ENUM:
      return EnumName(*from.GetEnum(message, &field));
    case FieldDescriptor::CPPTYPE_STRING:
      return Text(field, from.GetString(message, &field));
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(from.GetMessage(message, &field));
  }
  return nullptr;
}

Json Element(const Message& message, const FieldDescriptor& field, int i) {
  const Reflection& from = *message.GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return from.GetRepeatedBool(message, &field, i);
    case FieldDescriptor::CPPTYPE_INT32:
      return from.GetRepeatedInt32(message, &field, i);
    case FieldDescriptor::CPPTYPE_INT64:
      return from.GetRepeatedInt64(message, &field, i);
    case FieldDescriptor::CPPTYPE_UINT32:
      return from.GetRepeatedUInt32(message, &field, i);
    case FieldDescriptor::CPPTYPE_UINT64:
      return Unsigned64(field, from.GetRepeatedUInt64(message, &field, i));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return from.GetRepeatedFloat(message, &field, i);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return from.GetRepeatedDouble(message, &field, i);
    case FieldDescriptor::CPPTYPE_ENUM:
      return EnumName(*from.GetRepeatedEnum(message, &field, i));
    case FieldDescriptor::CPPTYPE_STRING:
      return Text(field, from.GetRepeatedString(message, &field, i));
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(from.GetRepeatedMessage(message, &field, i));
  }
  return nullptr;
}

}  // namespace

Json ToJson(const Message& message) {
  Json object = Json::object();
  const google::protobuf::Descriptor& type = *message.GetDescriptor();
  const Reflection& from = *message.GetReflection();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    if (field.is_repeated()) {
      Json list = Json::array();
      for (int n = 0; n < from.FieldSize(message, &field); ++n) {
        list.push_back(Element(message, field, n));
      }
      object[field.name()] = std::move(list);
    } else if (!field.has_presence() || from.HasField(message, &field)) {
      object[field.name()] = Single(message, field);
    }
  }
  return object;
}

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace larder::cli
