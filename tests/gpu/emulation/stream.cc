#include "tests/gpu/emulation/stream.h"

#include <memory>
#include <utility>

namespace larder::emulation {
namespace {

std::unique_ptr<Graph> captured;  // null: nothing is captured
bool broken = false;

}  // namespace

uint64_t graphs_launched = 0;

void Enqueue(Work work) {
  if (captured == nullptr) return work();
  captured->work.push_back(std::move(work));
}

bool BeginCapture() {
  if (captured != nullptr) return false;
  captured = std::make_unique<Graph>();
  broken = false;
  return true;
}

Graph* EndCapture() {
  if (broken) captured = nullptr;
  return captured.release();
}

bool MayInterrupt() {
  if (captured == nullptr) return true;
  broken = true;
  return false;
}

void Launch(const Graph& graph) {
  ++graphs_launched;
  for (const Work& work : graph.work) Enqueue(work);
}

}  // namespace larder::emulation
