#include "client/worker/gpu_graphs.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

namespace larder::worker {

void GpuGraphs::Run(const GpuGraphKey& key, absl::FunctionRef<void()> launch) {
  if (broken_) return launch();
  const auto found =
      std::find_if(known_.begin(), known_.end(), [&](const Known& k) { return k.key == key; });
  if (found == known_.end()) {
    if (known_.size() == kGraphsMax) known_.erase(known_.begin());
    known_.push_back({.key = key});
    return launch();
  }
  std::rotate(found, found + 1, known_.end());
  GpuGraph& graph = known_.back().graph;
  if (graph == nullptr) {
    absl::StatusOr<GpuGraph> captured = gpu_.Capture(launch);
    if (!captured.ok()) {
      std::fprintf(stderr, "larder-worker: computing without CUDA graphs: %s\n",
                   std::string(captured.status().message()).c_str());
      broken_ = true;
      known_.clear();
      return launch();
    }
    graph = *std::move(captured);
  }
  gpu_.Check(cudaGraphLaunch(graph.get(), gpu_.stream()), "a step's graph");
}

}  // namespace larder::worker
