/** Numbers with fewer bits, as several engines store them: f16, and blocks of 32 with one f16 scale. */

export const BLOCK = 32;

const floats = new Float32Array(1);
const words = new Uint32Array(floats.buffer);
const bitsOf = (x: number): number => {
  floats[0] = x;
  return words[0]!;
};

/** The bits of the f16 nearest to an f32, ties to even; beyond 65504 infinity. */
export function f32ToF16(x: number): number {
  const size = Math.abs(x);
  const sign = bitsOf(x) >>> 31 << 15;
  if (!(size < 65520)) return sign | (Number.isNaN(x) ? 0x7e00 : 0x7c00);
  // Adding this number leaves f64 no more digits than f16 has, so that the addition rounds.
  const exponent = Math.max((bitsOf(size) >>> 23) - 127, -14);
  const shift = 1.5 * 2 ** (exponent + 42);
  const rounded = size + shift - shift;
  const field = Math.max((bitsOf(rounded) >>> 23) - 127, -15);
  return sign | (field < -14 ? rounded * 2 ** 24 : ((field + 15) << 10) | (
    (rounded * 2 ** (10 - field)) & 1023));
}

/** The value of f16 bits of a finite number. */
export function f16ToF32(bits: number): number {
  const [sign, field, fraction] = [bits & 0x8000 ? -1 : 1, (bits >>> 10) & 31, bits & 1023];
  return sign * (field === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (field - 25));
}

/** The nearest f16 of every value, as f32. */
export function roundedToF16(values: Float32Array): Float32Array {
  return values.map((x) => f16ToF32(f32ToF16(x)));
}

/** Code c of block b stands for codes[b * 32 + c] * scales[b]. */
export interface Blocks {
  readonly bits: 4 | 8;
  /** -8 to 7, or -127 to 127. */
  readonly codes: Int8Array;
  /** Exact f16 numbers. */
  readonly scales: Float32Array;
}

/**
 * Rounds runs of 32 values to multiples of a scale: at 4 bits the largest value by magnitude becomes -8, at 8
 * bits plus or minus 127. Values that are such multiples already keep their codes. The count must be a
 * multiple of 32.
 */
export function toBlocks(values: Float32Array, bits: 4 | 8): Blocks {
  const count = values.length / BLOCK;
  if (!Number.isInteger(count)) throw new Error(
    `Blocks need a multiple of 32 values, found ${values.length}.`);
  const [codes, scales] = [new Int8Array(values.length), new Float32Array(count)];
  const [low, high, divisor] = bits === 4 ? [-8, 7, -8] : [-127, 127, 127];
  for (let b = 0; b < count; b++) {
    let largest = 0;
    for (let i = b * BLOCK; i < (b + 1) * BLOCK; i++) {
      if (Math.abs(values[i]!) > Math.abs(largest)) largest = values[i]!;
    }
    const scale = scales[b] = f16ToF32(f32ToF16(largest / divisor));
    if (scale === 0) continue;
    for (let i = b * BLOCK; i < (b + 1) * BLOCK; i++) {
      codes[i] = Math.min(high, Math.max(low, Math.round(values[i]! / scale)));
    }
  }
  return { bits, codes, scales };
}

/** The values that the blocks stand for; f32 holds them exactly. */
export function fromBlocks({ codes, scales }: Blocks): Float32Array {
  return Float32Array.from(codes, (code, i) => code * scales[Math.floor(i / BLOCK)]!);
}

/** Two 4-bit codes a byte, each plus 8: byte i of a block holds code 2i below code 2i + 1. */
export function packedInOrder({ codes }: Blocks): Uint8Array {
  return Uint8Array.from({ length: codes.length / 2 }, (_, i) => (codes[2 * i]! + 8) | (
    (codes[2 * i + 1]! + 8) << 4));
}

/**
 * The blocks as GGUF files have them: the scale's two bytes, then 32 bytes of codes (Q8_0) or 16 (Q4_0),
 * where byte i holds code i plus 8 below code i + 16 plus 8.
 */
export function ggufBlocks({ bits, codes, scales }: Blocks): Uint8Array {
  const size = 2 + (BLOCK * bits) / 8;
  const bytes = new Uint8Array(scales.length * size);
  for (let b = 0; b < scales.length; b++) {
    const [at, from] = [b * size, b * BLOCK];
    const scale = f32ToF16(scales[b]!);
    bytes[at] = scale & 255;
    bytes[at + 1] = scale >>> 8;
    for (let i = 0; i < size - 2; i++) {
      bytes[at + 2 + i] = bits === 8
        ? codes[from + i]! : (codes[from + i]! + 8) | ((codes[from + i + BLOCK / 2]! + 8) << 4);
    }
  }
  return bytes;
}
