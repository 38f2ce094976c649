// The ops of this folder and of blocked/ as the dispatcher calls them on CPU, with the types of their schemas
// (drive_kernels/sparse).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace drive {

using Maybe = std::optional<at::Tensor>;

// To input, values and bias.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor sparse_conv2d_cpu(const at::Tensor& input, const at::Tensor& values, at::TensorList pattern,
                             const Maybe& bias, at::IntArrayRef shape, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             const Maybe& residual, bool relu);
Gradients sparse_conv2d_backward_cpu(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& values,
                                     at::TensorList pattern, at::IntArrayRef shape, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                     std::array<bool, 3> needed);
at::Tensor sparse_linear_cpu(const at::Tensor& input, const at::Tensor& values, at::TensorList pattern,
                             const Maybe& bias, at::IntArrayRef shape);
Gradients sparse_linear_backward_cpu(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& values,
                                     at::TensorList pattern, at::IntArrayRef shape, std::array<bool, 3> needed);

at::Tensor sparse_gather_cpu(const at::Tensor& weight, const at::Tensor& index);
at::Tensor sparse_scatter_cpu(const at::Tensor& values, const at::Tensor& index, at::IntArrayRef shape);

at::Tensor to_blocks_cpu(const at::Tensor& input);
at::Tensor from_blocks_cpu(const at::Tensor& input, int64_t batch);

// Output, mean, variance; gradients to input, weight, bias and residual.
using Normed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using NormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Normed blocked_norm_cpu(const at::Tensor& input, int64_t batch, const at::Tensor& weight,
                        const at::Tensor& bias, double eps, const Maybe& residual, bool relu);
NormGradients blocked_norm_backward_cpu(const at::Tensor& grad, const at::Tensor& input, int64_t batch,
                                        const at::Tensor& weight, double eps, const at::Tensor& mean,
                                        const at::Tensor& var, const Maybe& output, bool residual);

}  // namespace drive
