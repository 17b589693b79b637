import { decodeFloat32, encodeFloat } from "../tensor/dtype.ts";
import { type NdArray, ndarray } from "../tensor/ndarray.ts";

const FILE_DTYPE = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

/** Every element rounded to the nearest value of the format, ties to even. */
export function cast(x: NdArray, dtype: keyof typeof FILE_DTYPE): NdArray {
  const file = FILE_DTYPE[dtype];
  return ndarray(x.shape, Float64Array.from(decodeFloat32(file, encodeFloat(file, x.data))));
}

/** The gradient looks through the rounding. */
export function cast_vjp([dy]: [NdArray | null]): (NdArray | null)[] {
  return [dy];
}
