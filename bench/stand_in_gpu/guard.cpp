// The device that torch asks for before each operation on a GPU: there is one, number 0, and nothing to switch to.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device first{c10::DeviceType::CUDA, 0};

struct OneGpu final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return first; }
  c10::Device getDevice() const override { return first; }
};

C10_REGISTER_GUARD_IMPL(CUDA, OneGpu)

}  // namespace
