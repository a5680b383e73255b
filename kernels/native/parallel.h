// Work shared by the threads of whoever calls, which for OpenVINO are those that the user asked for.
#pragma once

#include <cstddef>
#include <tbb/parallel_for.h>

namespace rt {

// body(index) for every index below `count`, in any order.
template <class Body>
void parallel(std::size_t count, const Body& body) {
  tbb::parallel_for(tbb::blocked_range<std::size_t>(0, count, 1), [&](const auto& range) {
    for (std::size_t index = range.begin(); index != range.end(); ++index) body(index);
  });
}

}  // namespace rt
