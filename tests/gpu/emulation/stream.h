// What a stream does with work: all at once and in order; while it is captured, nothing. Then the
// work goes into a graph, and each launch of the graph does it again.
//
// Thread safety: none.
//
// 1. A graph has arguments as they were when it was captured, and reads memory when it is launched.
// 2. Work may be captured that would fail if it ran: nothing of it runs until then.
// 3. A call that CUDA forbids during a capture breaks it: no graph comes of it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace larder::emulation {

using Work = std::function<void()>;

struct Graph {
  std::vector<Work> work;
};

// Runs `work`, which has its arguments by value, or adds it to the graph that is being captured.
void Enqueue(Work work);

bool BeginCapture();  // false: one is under way
// Ends it; null if it was broken or there is none. The caller's to delete.
Graph* EndCapture();
// Whether a call that waits or allocates may be made now. If not, the capture is broken.
bool MayInterrupt();

// Graphs that were launched by this process.
extern uint64_t graphs_launched;
void Launch(const Graph& graph);

}  // namespace larder::emulation
