import { f16ToF32, f32ToF16 } from "../tensor/dtype.ts";
import {
  dequantizeScaled, packNibbles, quantizeScaled, type Scaled, SCALED_LAYOUTS, type ScaledFormat,
  type ScaleRule, unpackNibbles,
} from "../tensor/formats.ts";
import { type NdArray, ndarray } from "../tensor/ndarray.ts";

type Integers = "q8" | "q4";
export type Format = Integers | Exclude<ScaledFormat, "nvfp4_16x16">;
interface Options {
  readonly scaleRule?: ScaleRule;
  readonly perRow?: boolean;
  readonly tiles?: boolean;
  readonly reciprocals?: boolean;
  readonly fourOverSix?: "absolute" | "squared";
}

const BLOCK = 32;
const BITS = { q8: 8, q4: 4 } as const;
/** Where value i of a word's values lies: the low halves of the bytes of q4 hold the first four. */
const shiftOf = { q8: (i: number) => 8 * i, q4: (i: number) => (i % 4) * 8 + (i >> 2) * 4 };
const OFFSET = { q8: 0, q4: 8 } as const;

/** The nearest whole number, ties to even. */
function nearestEven(x: number): number {
  const below = Math.floor(x);
  const rest = x - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below;
}

/**
 * Codes of values in blocks of 32 that share a scale. q8: scale = max |v| / 127; q4: scale = m / -8, where m
 * is the first value of the largest magnitude; rounded to half precision and saturated.
 * values [..., K] -> codes [..., K * bits / 32] of 32-bit words, scales [..., K / 32].
 */
function quantizeIntegers(values: NdArray, format: Integers): NdArray[] {
  const K = values.shape.at(-1)!;
  const lead = values.shape.slice(0, -1);
  const perWord = 32 / BITS[format];
  const codes = ndarray([...lead, K / perWord]);
  const scales = ndarray([...lead, K / BLOCK]);
  const [least, most] = format === "q8" ? [-127, 127] : [-8, 7];
  for (let b = 0; b < scales.data.length; b++) {
    const own = values.data.subarray(b * BLOCK, (b + 1) * BLOCK);
    const largest = own.reduce((found, v) => (Math.abs(v) > Math.abs(found) ? v : found), 0);
    const wanted = format === "q8" ? Math.abs(largest) / 127 : largest / -8;
    const scale = f16ToF32(f32ToF16(wanted, true));
    scales.data[b] = scale;
    own.forEach((v, i) => {
      // A quotient of an f32 and a half that is not a tie is farther from one than float64 rounds.
      const code = scale === 0 ? 0 : Math.min(Math.max(nearestEven(v / scale), least), most);
      const at = b * BLOCK + i;
      const word = Math.floor(at / perWord);
      const bits = ((code + OFFSET[format]) & (2 ** BITS[format] - 1)) << shiftOf[format](at % perWord);
      codes.data[word] = (codes.data[word]! | bits) >>> 0;
    });
  }
  return [codes, scales];
}

/** codes [..., K * bits / 32], scales [..., K / 32] -> values [..., K]. */
function dequantizeIntegers(codes: NdArray, scales: NdArray, format: Integers): NdArray {
  const perWord = 32 / BITS[format];
  const values = ndarray([...codes.shape.slice(0, -1), codes.shape.at(-1)! * perWord]);
  for (let i = 0; i < values.data.length; i++) {
    const bits = codes.data[Math.floor(i / perWord)]! >>> shiftOf[format](i % perWord);
    const code = format === "q8" ? (bits << 24) >> 24 : (bits & 15) - OFFSET.q4;
    values.data[i] = code * scales.data[Math.floor(i / BLOCK)]!;
  }
  return values;
}

/** Little-endian words of bytes, the last filled up with zeros. */
function words(bytes: Uint8Array): number[] {
  const padded = new Uint8Array(Math.ceil(bytes.length / 4) * 4);
  padded.set(bytes);
  return [...new Uint32Array(padded.buffer)];
}

function bytesOf(array: NdArray): Uint8Array {
  return new Uint8Array(Uint32Array.from(array.data).buffer);
}

/**
 * Codes, scales and for nvfp4 global scales as they lie in memory: every matrix of a stack for itself, and
 * fp8_blockwise in blocks of one row.
 */
export function quantize_blocks(values: NdArray, format: Format, options: Options = {}): NdArray[] {
  if (format === "q8" || format === "q4") return quantizeIntegers(values, format);
  const { shape } = values;
  const matrices = shape.length === 3 ? shape[0]! : 1;
  const own = shape.length === 3 ? shape.slice(1) : shape;
  const size = values.data.length / Math.max(matrices, 1);
  const { tiles, ...others } = options;
  const parts = Array.from({ length: matrices }, (_, e) => quantizeScaled(
    Float32Array.from(values.data.subarray(e * size, (e + 1) * size)), own, tiles ? "nvfp4_16x16" : format,
    { ...others, ...(format === "fp8_blockwise" ? { blockRows: 1 } : {}) }));
  const join = (of: (part: Scaled) => Uint8Array) => Uint8Array.from(parts.flatMap((part) => [...of(part)]));
  const half = SCALED_LAYOUTS[format].element === "e2m1";
  const packed = words(join(({ codes }) => half ? packNibbles(codes, shape.at(-1)!) : codes));
  const codes = ndarray([...shape.slice(0, -1), shape.at(-1)! / (half ? 8 : 4)], packed);
  // Every row of a tile holds its scale.
  const across = shape.at(-1)! / 16;
  const list = parts.flatMap(({ scales: all }) => (tiles
    ? Array.from({ length: 16 * all.length }, (_, i) =>
      all[Math.floor(i / across / 16) * across + (i % across)]!)
    : [...all]));
  if (SCALED_LAYOUTS[format].scale === "f32") {
    const width = shape.at(-1)! / 128;
    const scaleShape = format === "fp8_blockwise" ? [...shape.slice(0, -1), width] : [list.length];
    return [codes, ndarray(scaleShape, list)];
  }
  const scales = words(Uint8Array.from(list));
  const global = parts.map((part) => part.global!);
  return [
    codes, ndarray([scales.length], scales), ...(format === "nvfp4" ? [ndarray([matrices], global)] : []),
  ];
}

/** The values of what `quantize_blocks` gives; `divides`: the global scale is one to divide by. */
export function dequantize_blocks(
  codes: NdArray, scales: NdArray, format: Format, global: NdArray | null = null, divides = false,
): NdArray {
  if (divides) {
    const values = dequantize_blocks(codes, scales, format, ndarray([1], [1]));
    const each = values.data.length / global!.data.length;
    return ndarray(values.shape, [...values.data].map(
      (value, i) => Math.fround(value / global!.data[Math.floor(i / each)]!)));
  }
  if (format === "q8" || format === "q4") return dequantizeIntegers(codes, scales, format);
  const { element, scale, block } = SCALED_LAYOUTS[format];
  const half = element === "e2m1";
  const shape = [...codes.shape.slice(0, -1), codes.shape.at(-1)! * (half ? 8 : 4)];
  const K = shape.at(-1)!;
  const rows = shape.slice(0, -1).reduce((a, b) => a * b, 1);
  const all = half ? unpackNibbles(bytesOf(codes)) : bytesOf(codes);
  const across = block ? K / block[1] : 0;
  const list = scale === "f32" ? Float32Array.from(scales.data) : bytesOf(scales);
  const pick = (from: NdArray, row: number) => from.data[Math.floor((row * from.data.length) / rows)]!;
  const values = ndarray(shape);
  for (let row = 0; row < rows; row++) {
    const own = across ? list.slice(row * across, (row + 1) * across) : Float32Array.of(pick(scales, row));
    values.data.set(dequantizeScaled({
      format, shape: [1, K], codes: all.subarray(row * K, (row + 1) * K), scales: own,
      scaleShape: across ? [1, across] : [], global: global && pick(global, row),
    }), row * K);
  }
  return values;
}

/** y[t] = row ids[t] of the values, zero outside of the table. */
export function embedding_blocks(
  ids: NdArray, codes: NdArray, scales: NdArray, format: Format, global: NdArray | null = null,
  divides = false,
): NdArray {
  const table = dequantize_blocks(codes, scales, format, global, divides);
  const [V, D] = table.shape as [number, number];
  const y = ndarray([...ids.shape, D]);
  ids.data.forEach((id, t) => {
    if (id >= 0 && id < V) y.data.set(table.data.subarray(id * D, (id + 1) * D), t * D);
  });
  return y;
}
