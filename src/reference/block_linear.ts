import type { NdArray } from "../tensor/ndarray.ts";
import { grouped_linear, grouped_linear_vjp } from "./grouped_linear.ts";
import { linear, linear_vjp } from "./linear.ts";
import { dequantize_blocks, type Format } from "./quantize.ts";

interface Options {
  readonly format: Format;
  readonly global?: NdArray | null;
  readonly activation?: "relu2";
}

/** y = activation(x W^T + bias) + residual with the W that codes and scales stand for. */
export function linear_blocks(
  x: NdArray, codes: NdArray, scales: NdArray, bias: NdArray | null, residual: NdArray | null,
  { format, global, ...options }: Options,
): NdArray {
  return linear(x, dequantize_blocks(codes, scales, format, global), bias, residual, options);
}

/** dx = dy W; the weights have no gradient. */
export function linear_blocks_vjp(
  grads: readonly (NdArray | null)[], x: NdArray, codes: NdArray, scales: NdArray, bias: NdArray | null,
  residual: NdArray | null, { format, global, ...options }: Options,
): (NdArray | null)[] {
  const [dx, , dbias, dresidual] = linear_vjp(
    grads, x, dequantize_blocks(codes, scales, format, global), bias, residual, options);
  return [dx!, null, null, dbias!, dresidual!];
}

/** y[s] = W[e] x[s] for the rows of every expert e. */
export function grouped_linear_blocks(
  x: NdArray, codes: NdArray, scales: NdArray, offsets: NdArray, { format, global }: Options,
): NdArray {
  return grouped_linear(x, dequantize_blocks(codes, scales, format, global), offsets);
}

/** dx[s] = W[e]^T dy[s]. */
export function grouped_linear_blocks_vjp(
  grads: readonly (NdArray | null)[], x: NdArray, codes: NdArray, scales: NdArray, offsets: NdArray,
  { format, global }: Options,
): (NdArray | null)[] {
  const weight = dequantize_blocks(codes, scales, format, global);
  return [grouped_linear_vjp(grads, x, weight, offsets)[0]!, null, null, null];
}
