/**
 * Matrices in the formats of quantised checkpoints, on the host.
 *
 *   fp8    one f32 scale: amax / 448, E4M3 codes
 *   nvfp4  f32 scale of the tensor: amax / 2688; E4M3 scale of 16 columns: the block's amax / 6 / that, held
 *          within 2^-9 .. 448, 1 for a block of zeros; E2M1 codes
 *   mxfp8  scale of 32 columns: the smallest power of two with amax / 448 <= 2^e; E4M3 codes
 *
 * Codes are the nearest to value / scale, ties to the even one. `mse` chooses scales by the squared error of
 * the values instead: all block scales of NVFP4 (126 positive ones), the amax of FP8 shrunk in tenths of an
 * octave down to half (beyond that the codes repeat), the exponents next to that of MXFP8.
 * Layout and rules of ModelOpt. Tested in test/null/encode.test.ts.
 */
import type { CodedFormat, CodedWeight } from "../io/quantized.ts";
import { e2m1ToF32, e4m3ToF32, e8m0ToF32, f32ToE4m3 } from "../tensor/dtype.ts";
import { dequantizeScaled, quantizeScaled } from "../tensor/formats.ts";

/** Formats of `krait quantize`, without those made of several. */
export const TARGET_FORMATS = ["fp8", "mxfp8", "nvfp4"] as const;
export type TargetFormat = (typeof TARGET_FORMATS)[number];

/** How they are called among the formats of stored weights. */
export const CODED: Readonly<Record<TargetFormat, CodedFormat>> = {
  fp8: "fp8_e4m3", mxfp8: "mxfp8_e4m3", nvfp4: "nvfp4",
};

/** Columns that share a scale; rows must be whole blocks. */
export const BLOCK: Readonly<Record<TargetFormat, number>> = { fp8: 1, mxfp8: 32, nvfp4: 16 };

const { fround } = Math;
/** Largest values of the element formats. */
const E4M3_MAX = 448;
const E2M1_MAX = 6;

/**
 * Codes and scales of a matrix [rows, cols].
 * @param cols a multiple of the format's block
 * @param mse choose scales by the squared error instead of by the largest values
 */
export function encodeMatrix(
  values: Float32Array, shape: readonly number[], format: TargetFormat, mse = false,
): CodedWeight {
  const encode = { fp8: encodeFp8, mxfp8: encodeMxfp8, nvfp4: encodeNvfp4 }[format];
  return { format: CODED[format], shape, divides: false, ...encode(values, shape, mse) };
}

/** Bits of a weight with its part of the block's scale; the one scale of a tensor does not count. */
export const BITS: Readonly<Record<TargetFormat | "bf16", number>> = {
  bf16: 16, fp8: 8, mxfp8: 8 + 8 / 32, nvfp4: 4 + 8 / 16,
};

type Encoded = Pick<CodedWeight, "codes" | "scales" | "global">;

function largestMagnitude(values: Float32Array): number {
  let largest = 0;
  for (const value of values) largest = Math.max(largest, Math.abs(value));
  return largest;
}

function encodeFp8(values: Float32Array, shape: readonly number[], mse: boolean): Encoded {
  const amax = largestMagnitude(values);
  const withLargest = (largest: number) => quantizeScaled(
    values, shape, "fp8_e4m3", largest > 0 ? { tensorScale: largest / E4M3_MAX } : {});
  let best = withLargest(amax);
  if (mse) {
    let least = squaredError(values, dequantizeScaled(best));
    for (let step = 1; step <= 10; step++) {
      const candidate = withLargest(amax * 2 ** (-step / 10));
      const error = squaredError(values, dequantizeScaled(candidate));
      if (error < least) [least, best] = [error, candidate];
    }
  }
  return { codes: best.codes, scales: bytesOf(best.scales), global: 1 };
}

function encodeMxfp8(values: Float32Array, shape: readonly number[], mse: boolean): Encoded {
  const { codes, scales } = quantizeScaled(values, shape, "mxfp8_e4m3", { scaleRule: "ceil" });
  if (!mse) return { codes, scales: bytesOf(scales), global: 1 };
  for (const [b, first] of scales.entries()) {
    const block = values.subarray(32 * b, 32 * b + 32);
    const withScale = (byte: number) => block.map((value) => f32ToE4m3(value / e8m0ToF32(byte)));
    let [best, least] = [first, Infinity];
    for (const byte of [first, first - 1, first + 1]) {
      if (byte < 0 || byte > 254) continue;
      const scale = e8m0ToF32(byte);
      const rounded = withScale(byte).map((code) => e4m3ToF32(code) * scale);
      const error = squaredError(block, rounded);
      if (error < least) [least, best] = [error, byte];
    }
    scales[b] = best;
    codes.set(withScale(best), 32 * b);
  }
  return { codes, scales: bytesOf(scales), global: 1 };
}

function encodeNvfp4(values: Float32Array, _: readonly number[], mse: boolean): Encoded {
  const global = fround(largestMagnitude(values) / (E2M1_MAX * E4M3_MAX)) || 1;
  const codes = new Uint8Array(values.length / 2);
  const scales = new Uint8Array(values.length / 16);
  for (let b = 0; b < scales.length; b++) {
    const [from, to] = [16 * b, 16 * b + 16];
    const amax = largestMagnitude(values.subarray(from, to));
    const wanted = fround(fround(amax / E2M1_MAX) / global);
    let byte = f32ToE4m3(amax === 0 ? 1 : Math.max(wanted, 2 ** -9));
    if (mse && amax > 0) byte = leastErrorScale(values, from, global, amax, byte);
    scales[b] = byte;
    const scale = fround(E4M3_VALUES[byte]! * global);
    for (let i = from; i < to; i += 2) {
      codes[i / 2] = codeE2m1(fround(values[i]! / scale)) | (codeE2m1(fround(values[i + 1]! / scale)) << 4);
    }
  }
  return { codes, scales, global };
}

/** The E4M3 scale of 16 values with the least squared error; of equal ones the smallest. */
function leastErrorScale(
  values: Float32Array, from: number, global: number, amax: number, first: number,
): number {
  const errorOf = (byte: number, most: number): number => {
    const scale = E4M3_VALUES[byte]! * global;
    // What the largest value alone costs where it does not fit.
    let error = Math.max(0, amax - E2M1_MAX * scale) ** 2 > most ? Infinity : 0;
    for (let i = from; i < from + 16 && error <= most; i++) {
      const value = values[i]!;
      error += (value - E2M1_VALUES[codeE2m1(value / scale)]! * scale) ** 2;
    }
    return error;
  };
  let [best, least] = [first, errorOf(first, Infinity)];
  for (let byte = 1; byte <= 0x7e; byte++) {
    const error = errorOf(byte, least);
    if (error < least || (error === least && byte < best)) [best, least] = [byte, error];
  }
  return best;
}

const E4M3_VALUES = Float64Array.from({ length: 127 }, (_, code) => e4m3ToF32(code));
const E2M1_VALUES = Float64Array.from({ length: 16 }, (_, code) => e2m1ToF32(code));

/** The nearest E2M1 code, ties to the even one: the bounds between 0, 0.5, 1, 1.5, 2, 3, 4 and 6. */
function codeE2m1(x: number): number {
  const a = Math.abs(x);
  const code = a <= 0.25 ? 0
    : a < 0.75 ? 1
    : a <= 1.25 ? 2
    : a < 1.75 ? 3
    : a <= 2.5 ? 4
    : a < 3.5 ? 5
    : a <= 5 ? 6 : 7;
  return x < 0 || Object.is(x, -0) ? code | 8 : code;
}

function squaredError(values: Float32Array, rounded: Float32Array): number {
  let error = 0;
  for (let i = 0; i < values.length; i++) error += (values[i]! - rounded[i]!) ** 2;
  return error;
}

function bytesOf(values: Float32Array | Uint8Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}
