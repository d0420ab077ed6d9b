#include "client/names.h"

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace larder::cli {
namespace {

using google::protobuf::EnumDescriptor;
using google::protobuf::EnumValueDescriptor;

// The prefix is what the zero value has before "UNSPECIFIED".
std::string Prefix(const EnumDescriptor& type) {
  const std::string& zero = type.value(0)->name();
  const size_t at = zero.rfind("UNSPECIFIED");
  return at == std::string::npos ? "" : zero.substr(0, at);
}

absl::StatusOr<int> ParseEnum(const EnumDescriptor& type, std::string_view name) {
  const std::string upper = absl::AsciiStrToUpper(absl::string_view(name.data(), name.size()));
  std::vector<std::string> allowed;
  for (int i = 1; i < type.value_count(); ++i) {
    if (EnumName(*type.value(i)) == upper) return type.value(i)->number();
    allowed.push_back(absl::AsciiStrToLower(EnumName(*type.value(i))));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", std::string(name), "\" must be one of ", absl::StrJoin(allowed, ", ")));
}

std::string NameOf(const EnumDescriptor& type, int number) {
  const EnumValueDescriptor* const value = type.FindValueByNumber(number);
  return value == nullptr ? "?" : EnumName(*value);
}

}  // namespace

std::string EnumName(const EnumValueDescriptor& value) {
  return value.name().substr(Prefix(*value.type()).size());
}

std::string TierName(v1::Tier tier) { return NameOf(*v1::Tier_descriptor(), tier); }
std::string DTypeName(v1::DType dtype) { return NameOf(*v1::DType_descriptor(), dtype); }

absl::StatusOr<v1::Tier> ParseTier(std::string_view name) {
  absl::StatusOr<int> number = ParseEnum(*v1::Tier_descriptor(), name);
  if (!number.ok()) return number.status();
  return static_cast<v1::Tier>(*number);
}

absl::StatusOr<v1::DType> ParseDType(std::string_view name) {
  absl::StatusOr<int> number = ParseEnum(*v1::DType_descriptor(), name);
  if (!number.ok()) return number.status();
  return static_cast<v1::DType>(*number);
}

}  // namespace larder::cli
