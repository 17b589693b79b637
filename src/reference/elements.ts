import { f32ToE8m0 } from "../tensor/dtype.ts";
import { ELEMENTS, type ElementFormat, encodeStochastic, type StochasticFormat } from "../tensor/formats.ts";
import { type NdArray, ndarray } from "../tensor/ndarray.ts";

/** The code of every value: nearest, or chosen by random bits. */
export function encode_elements(
  x: NdArray, format: ElementFormat | "e8m0_floor", random: NdArray | null,
): NdArray {
  return ndarray(x.shape, x.data.map((value, i) => {
    if (format === "e8m0_floor") return f32ToE8m0(value, "floor");
    return random ? encodeStochastic(format as StochasticFormat, value, random.data[i]!)
      : ELEMENTS[format].encode(value);
  }));
}

/** The value of every code. */
export function decode_elements(codes: NdArray, format: ElementFormat): NdArray {
  return ndarray(codes.shape, codes.data.map((code) => ELEMENTS[format].decode(code)));
}

/** |x| / |y| or |x| |y| in float32; rounding the float64 result again changes nothing. */
export function exact_arithmetic(x: NdArray, y: NdArray, operation: "divide" | "multiply"): NdArray {
  return ndarray(x.shape, x.data.map((value, i) =>
    Math.fround(Math.abs(operation === "divide" ? value / y.data[i]! : value * y.data[i]!))));
}
