// The kernels as operators of OpenVINO's CPU device, for ONNX nodes of the domain `rt`.
//
// An operator declares bf16 in and out, so that the device hands over its own buffers without a conversion.
// https://docs.openvino.ai/2026/documentation/openvino-extensibility/custom-openvino-operations.html
#include "kernels.h"

#include <mutex>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

namespace rt::openvino {
namespace {

using ov::Node;
using ov::OutputVector;
using ov::TensorVector;

const bf16* read(const TensorVector& inputs, std::size_t index) {
  return static_cast<const bf16*>(static_cast<const void*>(inputs[index].data()));
}
bf16* write(TensorVector& outputs) { return static_cast<bf16*>(static_cast<void*>(outputs[0].data())); }

const float* read_floats(const TensorVector& inputs, std::size_t index) { return inputs[index].data<float>(); }

// What every operator has in common. `Self` gives the arithmetic, and how many of the first inputs are bf16: the others,
// parameters of norms and biases, are f32.
template <class Self>
class Operator : public ov::op::Op {
 public:
  Operator() = default;
  explicit Operator(const OutputVector& arguments) : Op(arguments) {}

  std::shared_ptr<Node> clone_with_new_inputs(const OutputVector& arguments) const override {
    auto copy = std::make_shared<Self>(static_cast<const Self&>(*this));
    copy->set_arguments(arguments);
    copy->validate_and_infer_types();
    return copy;
  }
  bool has_evaluate() const override { return true; }
  void validate_and_infer_types() override {
    for (std::size_t i = 0; i < get_input_size(); ++i) {
      const ov::element::Type wanted = i < Self::kHalves ? ov::element::bf16 : ov::element::f32;
      NODE_VALIDATION_CHECK(this, get_input_element_type(i) == wanted, "input ", i, " is ", get_input_element_type(i),
                            "; this kernel takes ", wanted);
    }
    set_output_type(0, ov::element::bf16, result());
  }
  bool evaluate(TensorVector& outputs, const TensorVector& inputs) const override {
    outputs[0].set_shape(result().to_shape());
    run(outputs, inputs);
    return true;
  }

 protected:
  virtual ov::PartialShape result() const { return get_input_partial_shape(0); }
  virtual void run(TensorVector& outputs, const TensorVector& inputs) const = 0;
};

// q, k, v → as q.
class Attention : public Operator<Attention> {
 public:
  OPENVINO_OP("Attention", "rt");
  using Operator::Operator;
  static constexpr std::size_t kHalves = 3;
  std::int64_t heads = 1;
  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("heads", heads);
    return true;
  }

 protected:
  void run(TensorVector& outputs, const TensorVector& inputs) const override {
    const auto &q = inputs[0].get_shape(), &k = inputs[1].get_shape();
    kernels().attention({q[0], q[1], k[1], std::size_t(heads), q[2] / std::size_t(heads)}, read(inputs, 0),
                        read(inputs, 1), read(inputs, 2), write(outputs));
  }
};

// x, scale, shift → as x.
class GroupNorm : public Operator<GroupNorm> {
 public:
  OPENVINO_OP("GroupNorm", "rt");
  using Operator::Operator;
  static constexpr std::size_t kHalves = 1;
  std::int64_t groups = 32, silu = 0;
  float epsilon = 1e-5f;
  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("groups", groups);
    visitor.on_attribute("epsilon", epsilon);
    visitor.on_attribute("silu", silu);
    return true;
  }

 protected:
  void run(TensorVector& outputs, const TensorVector& inputs) const override {
    const auto& x = inputs[0].get_shape();
    const std::size_t pixels = inputs[0].get_size() / x.front() / x.back();
    kernels().group_norm({x.front(), pixels, x.back(), std::size_t(groups), epsilon, silu != 0}, read(inputs, 0),
                         read_floats(inputs, 1), read_floats(inputs, 2), write(outputs));
  }
};

// x (…, 2 · width) → (…, width).
class Geglu : public Operator<Geglu> {
 public:
  OPENVINO_OP("Geglu", "rt");
  using Operator::Operator;
  static constexpr std::size_t kHalves = 1;
  bool visit_attributes(ov::AttributeVisitor&) override { return true; }

 protected:
  ov::PartialShape result() const override {
    ov::PartialShape shape = get_input_partial_shape(0);
    shape[shape.size() - 1] = shape[shape.size() - 1].get_length() / 2;
    return shape;
  }
  void run(TensorVector& outputs, const TensorVector& inputs) const override {
    const std::size_t width = inputs[0].get_shape().back() / 2;
    kernels().geglu(inputs[0].get_size() / (2 * width), width, read(inputs, 0), write(outputs));
  }
};

// x (batch, height, width, in), weight (out, in, 3, 3), bias → (batch, height, width, out).
class Convolution : public Operator<Convolution> {
 public:
  OPENVINO_OP("Convolution", "rt");
  using Operator::Operator;
  static constexpr std::size_t kHalves = 2;
  bool visit_attributes(ov::AttributeVisitor&) override { return true; }

 protected:
  ov::PartialShape result() const override {
    ov::PartialShape shape = get_input_partial_shape(0);
    shape[3] = get_input_partial_shape(1)[0];
    return shape;
  }
  void run(TensorVector& outputs, const TensorVector& inputs) const override {
    const auto &x = inputs[0].get_shape(), &weight = inputs[1].get_shape();
    std::call_once(packed_->once, [&] { packed_->filter = kernels().pack(weight[1], weight[0], read(inputs, 1)); });
    kernels().convolve({x[0], x[1], x[2], x[3], weight[0]}, read(inputs, 0), packed_->filter, read_floats(inputs, 2),
                       write(outputs));
  }

 private:
  // Of constant weights, packed when the first picture is drawn and shared by copies of the node.
  struct Packed {
    std::once_flag once;
    PackedFilter filter;
  };
  std::shared_ptr<Packed> packed_ = std::make_shared<Packed>();
};

template <class Op, class Configure>
ov::Extension::Ptr conversion(const char* name, std::size_t count, const Configure& configure) {
  return std::make_shared<ov::frontend::onnx::ConversionExtension>(
      name, "rt", [count, configure](const ov::frontend::NodeContext& node) -> OutputVector {
        OutputVector arguments;
        for (std::size_t i = 0; i < count; ++i) arguments.push_back(node.get_input(int(i)));
        auto op = std::make_shared<Op>(arguments);
        configure(node, *op);
        op->validate_and_infer_types();
        return op->outputs();
      });
}

std::vector<ov::Extension::Ptr> extensions() {
  using ov::frontend::NodeContext;
  return {
      std::make_shared<ov::OpExtension<Attention>>(),
      std::make_shared<ov::OpExtension<GroupNorm>>(),
      std::make_shared<ov::OpExtension<Geglu>>(),
      std::make_shared<ov::OpExtension<Convolution>>(),
      conversion<Attention>("Attention", 3,
                            [](const NodeContext& node, Attention& op) {
                              op.heads = node.get_attribute<std::int64_t>("heads");
                            }),
      conversion<GroupNorm>("GroupNorm", 3,
                            [](const NodeContext& node, GroupNorm& op) {
                              op.groups = node.get_attribute<std::int64_t>("groups");
                              op.epsilon = node.get_attribute<float>("epsilon");
                              op.silu = node.get_attribute<std::int64_t>("silu");
                            }),
      conversion<Geglu>("Geglu", 1, [](const NodeContext&, Geglu&) {}),
      conversion<Convolution>("Convolution", 3, [](const NodeContext&, Convolution&) {}),
  };
}

}  // namespace
}  // namespace rt::openvino

OPENVINO_CREATE_EXTENSIONS(rt::openvino::extensions())

// The name of the instruction set in use, for `rt doctor`; "" where RT_ISA names one that is missing.
extern "C" __attribute__((visibility("default"))) const char* rt_instruction_set() {
  try {
    return rt::kernels().name;
  } catch (const std::exception&) {
    return "";
  }
}

// Whether the processor multiplies tiles of bf16 itself, which these kernels do not use.
extern "C" __attribute__((visibility("default"))) int rt_has_amx() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("amx-bf16") != 0;
}
