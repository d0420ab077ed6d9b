// PyTorch's attention in a process of its own, which takes turns with ours.
//
// Thread safety: none.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace larder::bench {

class TorchPeer {
 public:
  // Starts torch_sdpa.py, which makes its tensors and tries its variants. NOT_FOUND: this python
  // has no torch.
  static absl::StatusOr<std::unique_ptr<TorchPeer>> Start(const std::string& script, int threads);
  // Closes its input, which ends it, and waits.
  ~TorchPeer();
  TorchPeer(const TorchPeer&) = delete;
  TorchPeer& operator=(const TorchPeer&) = delete;

  // "1.13.0, float32, grouped": the version, and the quickest variant.
  const std::string& variant() const { return variant_; }
  // Seconds of one pass over all layers.
  absl::StatusOr<double> Run();

 private:
  TorchPeer(pid_t pid, int input, int output) : pid_(pid), input_(input), output_(output) {}
  // The next line it prints, empty at its end.
  std::string Line() const;

  const pid_t pid_;
  const int input_;
  const int output_;
  std::string variant_;
};

}  // namespace larder::bench
