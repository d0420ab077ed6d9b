// storage_bandwidth: the copy engine against one large copy of pinned memory, the device's limit.
//
//   storage_bandwidth [DEVICE [MIB]]    MIB: of each measurement, 1024 where not said
//
// Workload: blocks of 2 MiB and of 192 KiB, shuffled so that few are neighbours on both sides, in
// batches of 4 MiB as StorageMover hands them over. Best of five, after one that is not counted.
// A row a figure: name, GB/s, against GB/s, ratio. gpu_both_ways_over_one is the sum of two
// directions at once over the one large copy to the device. The rows of streams are of 2 MiB
// blocks, with as many batches at the device as there are streams a direction (the engine's
// standard is 3); those of pages of the kinds that HOST may have. Last, what one block waits for
// when nothing else is copied.
#include <algorithm>
#include <chrono>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/storage_memory.h"

namespace larder::gpu {
namespace {

constexpr uint64_t kBatchBytes = 4 << 20;
constexpr uint64_t kBlockBytes = 2 << 20;

class Bandwidth {
 public:
  Bandwidth(std::shared_ptr<CudaDevice> device, uint64_t bytes, Pages pages = Pages::kSmall,
            CudaCopyEngine::Options options = {})
      : device_(std::move(device)),
        bytes_(bytes),
        memory_{Must(device_->Allocate(bytes), "allocate"),
                Must(device_->Allocate(bytes), "allocate")},
        up_(device_, bytes, pages),
        down_(device_, bytes, pages),
        engine_(Must(CudaCopyEngine::Start(device_, std::move(options)), "engine")) {}
  ~Bandwidth() {
    engine_.reset();
    for (const CudaPointer memory : memory_) device_->Free(memory);
  }

  // GB/s of both directions together. One block of all the bytes is one large copy.
  double Measure(bool up, bool down, uint64_t block_bytes) {
    double best = 0;
    for (int i = 0; i < 6; ++i) {
      const double rate = Once(up, down, block_bytes);
      if (i > 0) best = std::max(best, rate);
    }
    return best;
  }

  // Microseconds of a thousand copies of one block to the device, each alone, in order of length.
  std::vector<double> Latencies() {
    std::vector<double> times;
    for (int i = 0; i < 1000; ++i) {
      const auto start = std::chrono::steady_clock::now();
      Pending pending;
      engine_->Copy(CudaCopyEngine::kToDevice, {{memory_[0], up_.data(), kBlockBytes}},
                    pending.Add());
      pending.Wait();
      const std::chrono::duration<double, std::micro> time =
          std::chrono::steady_clock::now() - start;
      times.push_back(time.count());
    }
    std::sort(times.begin(), times.end());
    return times;
  }

 private:
  double Once(bool up, bool down, uint64_t block_bytes) {
    const std::vector<CudaCopyEngine::Batch> there = Batches(memory_[0], up_.data(), block_bytes);
    const std::vector<CudaCopyEngine::Batch> back = Batches(memory_[1], down_.data(), block_bytes);
    Pending pending;
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < there.size(); ++i) {
      if (up) engine_->Copy(CudaCopyEngine::kToDevice, there[i], pending.Add());
      if (down) engine_->Copy(CudaCopyEngine::kToHost, back[i], pending.Add());
    }
    pending.Wait();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    const uint64_t moved = bytes_ / block_bytes * block_bytes * (up && down ? 2 : 1);
    return static_cast<double>(moved) / time.count() / 1e9;
  }

  std::vector<CudaCopyEngine::Batch> Batches(CudaPointer device, std::byte* host,
                                             uint64_t block_bytes) const {
    std::vector<uint64_t> order(bytes_ / block_bytes);
    for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937_64(1));
    const uint64_t batch_blocks = std::max<uint64_t>(1, kBatchBytes / block_bytes);
    std::vector<CudaCopyEngine::Batch> batches;
    for (uint64_t i = 0; i < order.size(); ++i) {
      if (i % batch_blocks == 0) batches.emplace_back();
      batches.back().push_back(
          {device + i * block_bytes, host + order[i] * block_bytes, block_bytes});
    }
    return batches;
  }

  const std::shared_ptr<CudaDevice> device_;
  const uint64_t bytes_;
  const CudaPointer memory_[2];
  const PinnedMemory up_;
  const PinnedMemory down_;
  std::unique_ptr<CudaCopyEngine> engine_;
};

void Row(const std::string& name, double rate, double against) {
  std::printf("%-36s %8.2f %8.2f %6.3f\n", name.c_str(), rate, against, rate / against);
}

int Main(const std::string& which, uint64_t mib) {
  const std::shared_ptr<CudaDevice> device = Must(CudaDevice::Open(which), "open");
  std::printf("%s, %llu MiB\n%-36s %8s %8s %6s\n", device->name().c_str(),
              static_cast<unsigned long long>(mib), "name", "GB/s", "against", "ratio");
  const uint64_t bytes = mib << 20;
  Bandwidth bandwidth(device, bytes);
  const double h2d = bandwidth.Measure(true, false, bytes);
  const double d2h = bandwidth.Measure(false, true, bytes);
  for (const auto& [size, block] :
       {std::pair<std::string, uint64_t>{"_2mib", kBlockBytes}, {"_192kib", 192 << 10}}) {
    Row("gpu_h2d_over_pinned" + size, bandwidth.Measure(true, false, block), h2d);
    Row("gpu_d2h_over_pinned" + size, bandwidth.Measure(false, true, block), d2h);
    Row("gpu_both_ways_over_one" + size, bandwidth.Measure(true, true, block), h2d);
  }
  const auto vary = [&](const std::string& name, Pages pages, int streams) {
    CudaCopyEngine::Options options;
    options.streams_each_way = streams;
    Bandwidth other(device, bytes, pages, std::move(options));
    Row("gpu_h2d_" + name, other.Measure(true, false, kBlockBytes), h2d);
    Row("gpu_d2h_" + name, other.Measure(false, true, kBlockBytes), d2h);
  };
  for (const int streams : {1, 2, 4}) {
    vary("streams_" + std::to_string(streams), Pages::kSmall, streams);
  }
  vary("anonymous", Pages::kAnonymous, 3);
  if (HasPages(Pages::kTransparentHuge, bytes)) vary("thp", Pages::kTransparentHuge, 3);
  if (HasPages(Pages::kHugetlb, bytes)) vary("hugetlb", Pages::kHugetlb, 3);
  const std::vector<double> latencies = bandwidth.Latencies();
  std::printf("one block of 2 MiB, alone: median %.0f us, 99th percentile %.0f us\n",
              latencies[500], latencies[990]);
  return 0;
}

}  // namespace
}  // namespace larder::gpu

int main(int argc, char** argv) {
  return larder::gpu::Main(argc > 1 ? argv[1] : "",
                           argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1024);
}
