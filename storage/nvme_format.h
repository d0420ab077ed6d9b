// The record of one block on NVMe, byte by byte.
//
// RocksDB key:   slot number, 4 bytes big-endian, so that a scan runs in slot order.
// RocksDB value: 112 bytes, integers little-endian
//
//    0  u8   version, 2                32  32 bytes  block key
//    1  u8   codec, 0: stored as is    64  32 bytes  parent key
//    2  u16  zero                      96  u64       written at: wall clock, Unix seconds
//    4  u32  block bytes              104  u64       XXH3-64 of bytes 0..103, seeded with
//    8  u64  model id                                the slot number
//   16  u32  depth in blocks
//   20  u32  payload bytes in the slot file
//   24  u64  XXH3-64 of the payload
//
// Thread safety: pure functions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "absl/strings/string_view.h"
#include "storage/mover.h"
#include "storage/types.h"

namespace larder {

// Of the directory: the file FORMAT begins with this text. Any change of the slot file or of
// the records changes it, so that no build takes another's blocks for damaged ones.
inline constexpr char kNvmeFormatText[] = "larder nvme format 2 little-endian\n";
inline constexpr uint8_t kNvmeRecordVersion = 2;
inline constexpr size_t kNvmeRecordKeyBytes = 4;
inline constexpr size_t kNvmeRecordBytes = 112;

// A record as it is stored: what the layers above say, and what the payload looks like.
struct NvmeRecord {
  BlockRecord block;
  uint32_t block_bytes = 0;
  uint32_t payload_bytes = 0;  // the same while there are no codecs
  uint64_t payload_hash = 0;
};

std::array<char, kNvmeRecordKeyBytes> EncodeNvmeKey(Slot slot);
// nullopt: no key of ours.
std::optional<Slot> DecodeNvmeKey(absl::string_view key);

std::array<char, kNvmeRecordBytes> EncodeNvmeRecord(Slot slot, const NvmeRecord& record);
// nullopt: another version or codec, another slot's record, or damaged.
std::optional<NvmeRecord> DecodeNvmeRecord(Slot slot, absl::string_view value);

uint64_t PayloadHash(std::span<const std::byte> payload);

}  // namespace larder
