import type { NdArray } from "../tensor/ndarray.ts";
import { grouped_linear } from "./grouped_linear.ts";
import { linear } from "./linear.ts";
import { dequantize_blocks, type Format } from "./quantize.ts";

interface Options {
  readonly xFormat: Format;
  readonly format: Format;
  readonly xGlobal?: NdArray | null;
  readonly global?: NdArray | null;
}

/** y = x W^T, or with offsets y[s] = W[e] x[s], of the x and W that codes and scales stand for. */
export function packed_product(
  xCodes: NdArray, xScales: NdArray, codes: NdArray, scales: NdArray, offsets: NdArray | null,
  { xFormat, format, xGlobal, global }: Options,
): NdArray {
  const x = dequantize_blocks(xCodes, xScales, xFormat, xGlobal);
  const weight = dequantize_blocks(codes, scales, format, global);
  return offsets ? grouped_linear(x, weight, offsets) : linear(x, weight, null);
}
