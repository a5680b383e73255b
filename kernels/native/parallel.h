// Work shared by the threads of whoever calls, which for OpenVINO are those that the user asked for.
#pragma once

#include <cstddef>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

namespace rt {

// body(index) for every index below `count`, in any order. A thread that waits for the others takes up no other work
// meanwhile, which could be a kernel that needs the same thread's buffers.
template <class Body>
void parallel(std::size_t count, const Body& body) {
  tbb::this_task_arena::isolate([&] {
    tbb::parallel_for(tbb::blocked_range<std::size_t>(0, count, 1), [&](const auto& range) {
      for (std::size_t index = range.begin(); index != range.end(); ++index) body(index);
    });
  });
}

// Threads that share a call's work.
inline std::size_t threads() { return std::size_t(tbb::this_task_arena::max_concurrency()); }

}  // namespace rt
