/**
 * Number formats and their bit-exact conversions on the host.
 *
 * Names are those of safetensors headers. Every rounding is to nearest, ties to the even code. Bytes are
 * little-endian, as files and GPUs store them. Checked code by code in test/null/dtype.test.ts.
 */
import { DTypeError } from "./errors.ts";

export type DType =
  | "F64" | "F32" | "F16" | "BF16" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F4"
  | "I64" | "I32" | "I16" | "I8" | "U64" | "U32" | "U16" | "U8" | "BOOL";

export interface DTypeInfo {
  /** Bits of one element (F4: two elements share a byte, the first in the low half). */
  readonly bits: number;
  readonly kind: "float" | "int";
}

export const DTYPES: Readonly<Record<DType, DTypeInfo>> = {
  F64: { bits: 64, kind: "float" },
  F32: { bits: 32, kind: "float" },
  F16: { bits: 16, kind: "float" },
  BF16: { bits: 16, kind: "float" },
  F8_E4M3: { bits: 8, kind: "float" },
  F8_E5M2: { bits: 8, kind: "float" },
  F8_E8M0: { bits: 8, kind: "float" },
  F4: { bits: 4, kind: "float" },
  I64: { bits: 64, kind: "int" },
  I32: { bits: 32, kind: "int" },
  I16: { bits: 16, kind: "int" },
  I8: { bits: 8, kind: "int" },
  U64: { bits: 64, kind: "int" },
  U32: { bits: 32, kind: "int" },
  U16: { bits: 16, kind: "int" },
  U8: { bits: 8, kind: "int" },
  BOOL: { bits: 8, kind: "int" },
};

/** True when `name` is a format of the table. */
export function isDType(name: string): name is DType {
  return Object.hasOwn(DTYPES, name);
}

/** Bytes of one element; throws for F4, whose elements are half bytes. */
export function bytesPerElement(dtype: DType): number {
  const { bits } = DTYPES[dtype];
  if (bits % 8 !== 0) {
    throw new DTypeError(`dtype ${dtype}: expected whole bytes per element, found ${bits} bits`);
  }
  return bits / 8;
}

/** Bytes of `count` elements, or null when they do not fill whole bytes or exceed 2^53 bits. */
export function byteLengthOf(dtype: DType, count: number): number | null {
  const { bits } = DTYPES[dtype];
  if (count > Math.floor(Number.MAX_SAFE_INTEGER / bits)) return null;
  return (count * bits) % 8 === 0 ? (count * bits) / 8 : null;
}

const bitsF64 = new Float64Array(1);
const bitsU32of64 = new Uint32Array(bitsF64.buffer);
const bitsF32 = new Float32Array(1);
const bitsU32 = new Uint32Array(bitsF32.buffer);

/** A binary float format with `exp` exponent bits and `man` fraction bits below the sign bit. */
interface SmallFloat {
  readonly exp: number;
  readonly man: number;
  readonly bias: number;
  /** Magnitude code of the largest finite value. */
  readonly maxCode: number;
  /** Magnitude code that overflow gives when not saturating. */
  readonly overflowCode: number;
  readonly nanCode: number;
}

const F16_FORMAT: SmallFloat = {
  exp: 5, man: 10, bias: 15, maxCode: 0x7bff, overflowCode: 0x7c00, nanCode: 0x7e00,
};
const E4M3_FORMAT: SmallFloat = {
  exp: 4, man: 3, bias: 7, maxCode: 0x7e, overflowCode: 0x7f, nanCode: 0x7f,
};
const E5M2_FORMAT: SmallFloat = {
  exp: 5, man: 2, bias: 15, maxCode: 0x7b, overflowCode: 0x7c, nanCode: 0x7f,
};
// E2M1 has neither infinity nor NaN: both become its largest value.
const E2M1_FORMAT: SmallFloat = {
  exp: 2, man: 1, bias: 1, maxCode: 7, overflowCode: 7, nanCode: 7,
};

function encodeSmall(x: number, format: SmallFloat, saturate: boolean): number {
  const { exp, man, bias, maxCode, overflowCode, nanCode } = format;
  if (Number.isNaN(x)) return nanCode;
  bitsF64[0] = x;
  const high = bitsU32of64[1]!;
  const sign = (high >>> 31) << (exp + man);
  const overflow = sign | (saturate ? maxCode : overflowCode);
  const magnitude = Math.abs(x);
  if (magnitude === Infinity) return overflow;
  const minExponent = 1 - bias;
  const exponent = Math.max(((high >>> 20) & 0x7ff) - 1023, minExponent);
  if (exponent > bias + 1) return overflow;
  // Scaling by a power of two is exact: this is the value in units of the last place, to be rounded once.
  const units = magnitude * 2 ** (man - exponent);
  const below = Math.floor(units);
  const rest = units - below;
  const rounded = rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
  // A carry out of the fraction reaches the next exponent by itself: codes of one sign are in order of value.
  const code = ((exponent - minExponent + 1) << man) + rounded - (1 << man);
  return code > maxCode ? overflow : sign | code;
}

function decodeSmall(code: number, format: SmallFloat): number {
  const { exp, man, bias, maxCode, overflowCode, nanCode } = format;
  const magnitude = code & ((1 << (exp + man)) - 1);
  const sign = (code >>> (exp + man)) & 1 ? -1 : 1;
  if (magnitude > maxCode) {
    return magnitude === overflowCode && overflowCode !== nanCode ? sign * Infinity : NaN;
  }
  const field = magnitude >>> man;
  const fraction = magnitude & ((1 << man) - 1);
  if (field === 0) return sign * fraction * 2 ** (1 - bias - man);
  return sign * ((1 << man) + fraction) * 2 ** (field - bias - man);
}

/** The value of a bfloat16 code (0 .. 0xFFFF). */
export function bf16ToF32(code: number): number {
  bitsU32[0] = code << 16;
  return bitsF32[0]!;
}

/**
 * The bfloat16 code nearest to float32(x). Overflow and infinities give infinity, or the largest finite value
 * with `saturate`; NaN gives 0x7FC0.
 */
export function f32ToBf16(x: number, saturate = false): number {
  bitsF32[0] = x;
  const bits = bitsU32[0]!;
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  // Adding just under half of the last place, plus one where the kept part is odd, rounds ties to even.
  const code = ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
  return saturate && (code & 0x7fff) === 0x7f80 ? (code & 0x8000) | 0x7f7f : code;
}

/** The value of an IEEE half precision code (0 .. 0xFFFF). */
export const f16ToF32 = (code: number): number => decodeSmall(code, F16_FORMAT);

/** The half precision code nearest to x. Overflow gives infinity, +-65504 with `saturate`; NaN 0x7E00. */
export const f32ToF16 = (x: number, saturate = false): number => encodeSmall(x, F16_FORMAT, saturate);

/** The value of an E4M3 (fn) code: no infinities, 0x7F and 0xFF are NaN, largest 448. */
export const e4m3ToF32 = (code: number): number => decodeSmall(code, E4M3_FORMAT);

/** The E4M3 code nearest to x. Overflow gives +-448, or NaN when not saturating; NaN gives 0x7F. */
export const f32ToE4m3 = (x: number, saturate = true): number => encodeSmall(x, E4M3_FORMAT, saturate);

/** The value of an E5M2 code: infinities at 0x7C and 0xFC, largest 57344. */
export const e5m2ToF32 = (code: number): number => decodeSmall(code, E5M2_FORMAT);

/** The E5M2 code nearest to x. Overflow gives +-57344, or infinity when not saturating; NaN gives 0x7F. */
export const f32ToE5m2 = (x: number, saturate = true): number => encodeSmall(x, E5M2_FORMAT, saturate);

/** The value of an E2M1 code (0 .. 15): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, with bit 3 set, their negatives. */
export const e2m1ToF32 = (code: number): number => decodeSmall(code & 15, E2M1_FORMAT);

/** The E2M1 code nearest to x; the largest magnitude is 6, and NaN (which the format lacks) gives 7. */
export const f32ToE2m1 = (x: number): number => encodeSmall(x, E2M1_FORMAT, true);

/** The value of an E8M0 scale code: 2^(code - 127); 255 is NaN. */
export function e8m0ToF32(code: number): number {
  return code === 255 ? NaN : 2 ** (code - 127);
}

/**
 * The E8M0 code of a power of two next to |x|: the largest not above (`floor`) or the smallest not below
 * (`ceil`), held within codes 0 .. 254. Zero gives 0, infinity 254, NaN 255.
 */
export function f32ToE8m0(x: number, direction: "floor" | "ceil"): number {
  if (Number.isNaN(x)) return 255;
  const magnitude = Math.abs(x);
  if (magnitude === 0) return 0;
  if (magnitude === Infinity) return 254;
  bitsF64[0] = magnitude;
  const exponent = (bitsU32of64[1]! >>> 20) - 1023;
  const isPower = (bitsU32of64[1]! & 0xfffff) === 0 && bitsU32of64[0] === 0;
  const wanted = direction === "ceil" && !isPower ? exponent + 1 : exponent;
  return Math.min(Math.max(wanted + 127, 0), 254);
}

let f16Values: Float32Array | undefined;
const byteValues = new Map<DType, Float32Array>();

function tableOf(dtype: "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F4"): Float32Array {
  let table = byteValues.get(dtype);
  if (!table) {
    const decode = { F8_E4M3: e4m3ToF32, F8_E5M2: e5m2ToF32, F8_E8M0: e8m0ToF32, F4: e2m1ToF32 }[dtype];
    table = Float32Array.from({ length: dtype === "F4" ? 16 : 256 }, (_, code) => decode(code));
    byteValues.set(dtype, table);
  }
  return table;
}

function codesOf(dtype: DType, bytes: Uint8Array): Uint16Array | Uint8Array {
  if (DTYPES[dtype].bits !== 16) return bytes;
  return new Uint16Array(aligned(bytes, 2), 0, bytes.length / 2);
}

/** The bytes in a buffer of their own: a typed array view needs an offset that is a multiple of its width. */
function aligned(bytes: Uint8Array, width: number): ArrayBuffer {
  if (bytes.length % width !== 0) {
    throw new DTypeError(`expected a multiple of ${width} bytes, found ${bytes.length} bytes`);
  }
  // Not slice(): on a Node Buffer that is a view.
  return new Uint8Array(bytes).buffer;
}

/**
 * Values of `bytes` as float32. Exact for every format but F64, which is rounded.
 * Throws DTypeError for integer formats and for a length that is not whole elements.
 */
export function decodeFloat32(dtype: DType, bytes: Uint8Array): Float32Array {
  switch (dtype) {
    case "F32":
      return new Float32Array(aligned(bytes, 4));
    case "F64":
      return Float32Array.from(new Float64Array(aligned(bytes, 8)));
    case "BF16": {
      const codes = codesOf(dtype, bytes);
      const bits = new Uint32Array(codes.length);
      for (let i = 0; i < codes.length; i++) bits[i] = codes[i]! << 16;
      return new Float32Array(bits.buffer);
    }
    case "F16": {
      f16Values ??= Float32Array.from({ length: 65536 }, (_, code) => f16ToF32(code));
      const codes = codesOf(dtype, bytes);
      const out = new Float32Array(codes.length);
      for (let i = 0; i < codes.length; i++) out[i] = f16Values[codes[i]!]!;
      return out;
    }
    case "F8_E4M3":
    case "F8_E5M2":
    case "F8_E8M0": {
      const table = tableOf(dtype);
      const out = new Float32Array(bytes.length);
      for (let i = 0; i < bytes.length; i++) out[i] = table[bytes[i]!]!;
      return out;
    }
    case "F4": {
      const table = tableOf(dtype);
      const out = new Float32Array(bytes.length * 2);
      for (let i = 0; i < bytes.length; i++) {
        out[2 * i] = table[bytes[i]! & 15]!;
        out[2 * i + 1] = table[bytes[i]! >>> 4]!;
      }
      return out;
    }
    default:
      throw new DTypeError(`dtype ${dtype}: expected a float format, found an integer format`);
  }
}

/**
 * Values of `bytes` as int32 (BOOL as 0 and 1).
 * Throws DTypeError for float formats and for a value outside the int32 range.
 */
export function decodeInt32(dtype: DType, bytes: Uint8Array): Int32Array {
  const narrow = (values: Uint32Array | BigInt64Array | BigUint64Array): Int32Array => {
    const out = new Int32Array(values.length);
    for (let i = 0; i < values.length; i++) {
      out[i] = Number(values[i]);
      if (BigInt(out[i]!) !== BigInt(values[i]!)) {
        throw new DTypeError(`dtype ${dtype}: value ${values[i]} at index ${i} is outside the int32 range`);
      }
    }
    return out;
  };
  switch (dtype) {
    case "I32":
      return new Int32Array(aligned(bytes, 4));
    case "U32":
      return narrow(new Uint32Array(aligned(bytes, 4)));
    case "I64":
      return narrow(new BigInt64Array(aligned(bytes, 8)));
    case "U64":
      return narrow(new BigUint64Array(aligned(bytes, 8)));
    case "I16":
      return Int32Array.from(new Int16Array(aligned(bytes, 2)));
    case "U16":
      return Int32Array.from(new Uint16Array(aligned(bytes, 2)));
    case "I8":
      return Int32Array.from(new Int8Array(aligned(bytes, 1)));
    case "U8":
    case "BOOL":
      return Int32Array.from(bytes);
    default:
      throw new DTypeError(`dtype ${dtype}: expected an integer format, found a float format`);
  }
}

/**
 * Bytes of `values` in a float format, each value rounded once to the nearest code, ties to even.
 * `saturate` (default: true for the 8-bit and 4-bit formats) turns overflow into the largest finite value.
 * F8_E8M0 rounds up to a power of two. Throws DTypeError for integer formats and an odd count of F4 values.
 */
export function encodeFloat(
  dtype: DType, values: Float32Array | Float64Array, saturate?: boolean,
): Uint8Array {
  const n = values.length;
  const bytesOf = (a: Float64Array | Float32Array | Uint16Array): Uint8Array =>
    new Uint8Array(a.buffer, 0, a.byteLength);
  const fill = <A extends Uint8Array | Uint16Array>(codes: A, encode: (x: number) => number): A => {
    for (let i = 0; i < n; i++) codes[i] = encode(values[i]!);
    return codes;
  };
  switch (dtype) {
    case "F32":
      return bytesOf(Float32Array.from(values));
    case "F64":
      return bytesOf(Float64Array.from(values));
    case "BF16":
      return bytesOf(fill(new Uint16Array(n), (x) => f32ToBf16(x, saturate ?? false)));
    case "F16":
      return bytesOf(fill(new Uint16Array(n), (x) => f32ToF16(x, saturate ?? false)));
    case "F8_E4M3":
      return fill(new Uint8Array(n), (x) => f32ToE4m3(x, saturate ?? true));
    case "F8_E5M2":
      return fill(new Uint8Array(n), (x) => f32ToE5m2(x, saturate ?? true));
    case "F8_E8M0":
      return fill(new Uint8Array(n), (x) => f32ToE8m0(x, "ceil"));
    case "F4": {
      if (n % 2 !== 0) throw new DTypeError(`dtype F4: expected an even count of values, found ${n}`);
      const out = new Uint8Array(n / 2);
      for (let i = 0; i < out.length; i++) {
        out[i] = f32ToE2m1(values[2 * i]!) | (f32ToE2m1(values[2 * i + 1]!) << 4);
      }
      return out;
    }
    default:
      throw new DTypeError(`dtype ${dtype}: expected a float format, found an integer format`);
  }
}
