import { f16ToF32, f32ToF16 } from "../tensor/dtype.ts";
import { type NdArray, ndarray } from "../tensor/ndarray.ts";

type Format = "q8" | "q4";

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
export function quantize_blocks(values: NdArray, format: Format): NdArray[] {
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
export function dequantize_blocks(codes: NdArray, scales: NdArray, format: Format): NdArray {
  const perWord = 32 / BITS[format];
  const values = ndarray([...codes.shape.slice(0, -1), codes.shape.at(-1)! * perWord]);
  for (let i = 0; i < values.data.length; i++) {
    const bits = codes.data[Math.floor(i / perWord)]! >>> shiftOf[format](i % perWord);
    const code = format === "q8" ? (bits << 24) >> 24 : (bits & 15) - OFFSET.q4;
    values.data[i] = code * scales.data[Math.floor(i / BLOCK)]!;
  }
  return values;
}

/** y[t] = row ids[t] of the values, zero outside of the table. */
export function embedding_blocks(ids: NdArray, codes: NdArray, scales: NdArray, format: Format): NdArray {
  const table = dequantize_blocks(codes, scales, format);
  const [V, D] = table.shape as [number, number];
  const y = ndarray([...ids.shape, D]);
  ids.data.forEach((id, t) => {
    if (id >= 0 && id < V) y.data.set(table.data.subarray(id * D, (id + 1) * D), t * D);
  });
  return y;
}
