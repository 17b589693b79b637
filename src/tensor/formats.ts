/**
 * Low-precision formats by their names in papers and on the command line: single elements, and blocks of
 * elements that share a scale. Codes and scales are bit exact: shaders/lib/formats.wgsl and
 * shaders/lib/scaled.wgsl give the same. Steps said to be "in float32" round once each, to nearest even.
 *
 *   mxfp8_e4m3, mxfp8_e5m2, mxfp4  32 neighbours share a power of two 2^e; value = element * 2^e
 *   nvfp4          16 neighbours share an E4M3 scale s, the tensor a float32 g; value = element * s * g
 *   nvfp4_16x16    the same with one scale for a tile of 16 x 16, so that a matrix and its transpose agree
 *   fp8_e4m3, fp8_e5m2  one float32 scale for the tensor, or for a row; value = element * scale
 *   fp8_blockwise  E4M3 with a float32 scale, a power of two, for 128 neighbours or a tile of 128 x 128
 *
 * Sources: OCP Microscaling Formats 1.0; "Pretraining Large Language Models with NVFP4" (2025).
 * Tested in test/null/formats.test.ts against tables computed in exact arithmetic.
 */
import {
  bf16ToF32, type DType, e2m1ToF32, e4m3ToF32, e5m2ToF32, e8m0ToF32, f16ToF32, f32ToBf16, f32ToE2m1,
  f32ToE4m3, f32ToE5m2, f32ToE8m0, f32ToF16,
} from "./dtype.ts";
import { ShapeError, UsageError } from "./errors.ts";
import { sizeOf } from "./ndarray.ts";

export type ElementFormat = "e4m3fn" | "e5m2" | "e2m1" | "e8m0" | "bf16" | "f16";

export interface Element {
  readonly bits: number;
  /** Name in safetensors files. */
  readonly dtype: DType;
  /** The largest finite value, and the exponent of the power of two that is not above it. */
  readonly max: number;
  readonly emax: number;
  /** The code nearest to x, ties to even; `saturate` (the default) keeps overflow at the largest value. */
  encode(x: number, saturate?: boolean): number;
  decode(code: number): number;
}

export const ELEMENTS: Readonly<Record<ElementFormat, Element>> = {
  e4m3fn: {
    bits: 8, dtype: "F8_E4M3", max: 448, emax: 8, decode: e4m3ToF32,
    encode: (x, saturate = true) => f32ToE4m3(x, saturate),
  },
  e5m2: {
    bits: 8, dtype: "F8_E5M2", max: 57344, emax: 15, decode: e5m2ToF32,
    encode: (x, saturate = true) => f32ToE5m2(x, saturate),
  },
  e2m1: { bits: 4, dtype: "F4", max: 6, emax: 2, decode: e2m1ToF32, encode: f32ToE2m1 },
  // A power of two not below |x|.
  e8m0: {
    bits: 8, dtype: "F8_E8M0", max: 2 ** 127, emax: 127, decode: e8m0ToF32,
    encode: (x) => f32ToE8m0(x, "ceil"),
  },
  bf16: {
    bits: 16, dtype: "BF16", max: 3.3895313892515355e38, emax: 127, decode: bf16ToF32,
    encode: (x, saturate = true) => f32ToBf16(x, saturate),
  },
  f16: {
    bits: 16, dtype: "F16", max: 65504, emax: 15, decode: f16ToF32,
    encode: (x, saturate = true) => f32ToF16(x, saturate),
  },
};

export function isElementFormat(name: string): name is ElementFormat {
  return Object.hasOwn(ELEMENTS, name);
}

/** Fraction bits, exponent bias, largest magnitude code, code of NaN, and random bits of one rounding. */
const STOCHASTIC = {
  e4m3fn: { man: 3, bias: 7, maxCode: 0x7e, nanCode: 0x7f, sign: 0x80, random: 8 },
  e5m2: { man: 2, bias: 15, maxCode: 0x7b, nanCode: 0x7f, sign: 0x80, random: 8 },
  e2m1: { man: 1, bias: 1, maxCode: 7, nanCode: 7, sign: 8, random: 8 },
  bf16: { man: 7, bias: 127, maxCode: 0x7f7f, nanCode: 0x7fc0, sign: 0x8000, random: 16 },
  f16: { man: 10, bias: 15, maxCode: 0x7bff, nanCode: 0x7e00, sign: 0x8000, random: 16 },
} as const;

/** Formats to which values can be rounded at random. */
export type StochasticFormat = keyof typeof STOCHASTIC;

const bitsF32 = new Float32Array(1);
const bitsU32 = new Uint32Array(bitsF32.buffer);

/**
 * One of the two codes around float32(x): the farther from zero when the fraction of the step that |x| has
 * gone past the nearer, plus random / 2^n, reaches 1. n = 8 for formats of 8 and 4 bits, 16 for halves; with
 * uniform bits the expected value is x up to 2^-n of a step. Saturates; NaN gives the format's NaN, or +6.
 *
 * @param random  n random bits; higher bits are ignored
 */
export function encodeStochastic(format: StochasticFormat, x: number, random: number): number {
  const { man, bias, maxCode, nanCode, sign, random: n } = STOCHASTIC[format];
  bitsF32[0] = x;
  const bits = bitsU32[0]!;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return nanCode;
  const field = magnitude >>> 23;
  const fraction = magnitude & 0x7fffff;
  // |x| = significand * 2^(exponent - 150), subnormals as numbers of 24 bits too.
  const shift = field === 0 ? Math.clz32(fraction) - 8 : 0;
  const significand = field === 0 ? fraction << shift : fraction | 0x800000;
  const exponent = field === 0 ? 1 - shift : field;
  const least = 128 - bias;
  const lost = 23 - man + Math.max(least - exponent, 0);
  let code = 0;
  if (lost < 32) {
    const part = random & (2 ** n - 1);
    const added = lost >= n ? part * 2 ** (lost - n) : part >>> (n - lost);
    code = Math.max(exponent - least, 0) * 2 ** man + Math.floor((significand + added) / 2 ** lost);
  }
  return (bits >>> 31 ? sign : 0) | Math.min(code, maxCode);
}

/** The name of every scaled format, in the order of a listing. */
export const SCALED_FORMATS = [
  "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4", "nvfp4_16x16", "fp8_e4m3", "fp8_e5m2", "fp8_blockwise",
] as const;
export type ScaledFormat = (typeof SCALED_FORMATS)[number];

export interface ScaledLayout {
  readonly element: "e4m3fn" | "e5m2" | "e2m1";
  /** Rows and columns that share a scale; null where it is the whole tensor (or a row). */
  readonly block: readonly [rows: number, columns: number] | null;
  readonly scale: "e8m0" | "e4m3fn" | "f32";
  /** A float32 scale of the tensor beside those of the blocks. */
  readonly global: boolean;
}

export const SCALED_LAYOUTS: Readonly<Record<ScaledFormat, ScaledLayout>> = {
  mxfp8_e4m3: { element: "e4m3fn", block: [1, 32], scale: "e8m0", global: false },
  mxfp8_e5m2: { element: "e5m2", block: [1, 32], scale: "e8m0", global: false },
  mxfp4: { element: "e2m1", block: [1, 32], scale: "e8m0", global: false },
  nvfp4: { element: "e2m1", block: [1, 16], scale: "e4m3fn", global: true },
  nvfp4_16x16: { element: "e2m1", block: [16, 16], scale: "e4m3fn", global: true },
  fp8_e4m3: { element: "e4m3fn", block: null, scale: "f32", global: false },
  fp8_e5m2: { element: "e5m2", block: null, scale: "f32", global: false },
  fp8_blockwise: { element: "e4m3fn", block: [128, 128], scale: "f32", global: false },
};

export function isScaledFormat(name: string): name is ScaledFormat {
  return Object.hasOwn(SCALED_LAYOUTS, name);
}

/** How the exponent of a power-of-two scale follows from the largest magnitude of a block. */
export type ScaleRule = "floor" | "ceil";

export interface ScaledOptions {
  /** MX formats: floor(log2 amax) - emax (the default, that of OCP), or the least that avoids saturation. */
  readonly scaleRule?: ScaleRule;
  /**
   * NVFP4: g instead of amax / 2688, such as one found by calibration. fp8_e4m3, fp8_e5m2: the scale instead
   * of amax / max.
   */
  readonly tensorScale?: number;
  /**
   * nvfp4: tries for every block the scale that maps its largest magnitude to 6 and the one that maps it to
   * 4, and keeps the one whose values are closer, in the sum of absolute or squared differences; g then is
   * amax / 1536.
   */
  readonly fourOverSix?: "absolute" | "squared";
  /**
   * NVFP4: products with reciprocals instead of quotients, the order of operations of Transformer Engine. All
   * in float32: S = min(2688 / amax, FLT_MAX), or 1 where amax or that is 0; s = E4M3(amax_block * (S / 6));
   * element = x * min(1 / (s * g), FLT_MAX) with g = 1 / S. Not with `tensorScale` or `fourOverSix`.
   */
  readonly reciprocals?: boolean;
  /** fp8_e4m3, fp8_e5m2: one scale per row (all dimensions but the last) instead of one for the tensor. */
  readonly perRow?: boolean;
  /** fp8_blockwise: rows that share a scale; default 128. */
  readonly blockRows?: 1 | 128;
  /** The 8 random bits that round element i; without, elements are rounded to nearest even. */
  readonly random?: (element: number) => number;
  /** Name of the tensor in errors. */
  readonly name?: string;
}

/** A tensor in a scaled format. */
export interface Scaled {
  readonly format: ScaledFormat;
  readonly shape: readonly number[];
  /** One code per element, in the element's low bits. */
  readonly codes: Uint8Array;
  /** Codes of E8M0 or E4M3, or float32 scales. */
  readonly scales: Uint8Array | Float32Array;
  /** The shape with blocks for elements; [] for one scale of the whole tensor. */
  readonly scaleShape: readonly number[];
  /** NVFP4's g. */
  readonly global: number | null;
  /** NVFP4: values are element * (scale * g), as with the option of that name. */
  readonly reciprocals?: boolean;
}

const { fround } = Math;
/** Exponent range of a shared power of two. */
const E8M0_LIMIT = 127;
/** 448 * 6, and 256 * 6 where 1.5 times the scale must fit as well. */
const NVFP4_RANGE = { six: 2688, fourOverSix: 1536 } as const;
const FLT_MAX = (2 - 2 ** -23) * 2 ** 127;

/** Rows and columns of the blocks of a format for a shape. Throws ShapeError when they do not divide it. */
export function blockOf(
  format: ScaledFormat, shape: readonly number[], { perRow, blockRows, name }: ScaledOptions = {},
): [rows: number, columns: number] {
  const { block } = SCALED_LAYOUTS[format];
  const columns = shape.at(-1) ?? 1;
  if (!block) return [perRow ? 1 : Math.max(sizeOf(shape.slice(0, -1)), 1), Math.max(columns, 1)];
  const [rows, wide] = [block[0] === 128 ? blockRows ?? 128 : block[0], block[1]];
  const what = name === undefined ? format : `tensor "${name}": ${format}`;
  const tile = rows === 1 ? `${wide}` : `${rows} x ${wide}`;
  const found = `[${shape.join(", ")}]`;
  if (shape.length < (rows === 1 ? 1 : 2)) {
    const least = rows === 1 ? "one dimension" : "two dimensions";
    throw new ShapeError(`${what} has blocks of ${tile}: expected at least ${least}, found ${found}.`);
  }
  if (columns % wide !== 0) {
    throw new ShapeError(
      `${what} has blocks of ${tile}: expected a last dimension that is a multiple of ${wide}, found ` +
      `${found}.`);
  }
  if (rows > 1 && shape.at(-2)! % rows !== 0) {
    throw new ShapeError(
      `${what} has blocks of ${tile}: expected a last but one dimension that is a multiple of ${rows}, ` +
      `found ${found}.`);
  }
  return [rows, wide];
}

/** The shape of the scales of a tensor. Throws ShapeError when the blocks do not divide it. */
export function scaleShapeOf(
  format: ScaledFormat, shape: readonly number[], options: ScaledOptions = {},
): number[] {
  const [rows, columns] = blockOf(format, shape, options);
  if (!SCALED_LAYOUTS[format].block) return options.perRow ? shape.slice(0, -1) : [];
  return shape.map((extent, i) =>
    i === shape.length - 1 ? extent / columns : i === shape.length - 2 ? extent / rows : extent);
}

/**
 * Values in a scaled format.
 *
 *   MX          scale code = clamp(e, -127, 127) + 127, 0 for a block of zeros; element = x / 2^e, exact
 *   NVFP4       in float32: g = amax / 2688; s = E4M3((amax_block / 6) / g); d = s * g; element = x / d, a
 *               zero with the sign of x where d is 0
 *               (with `reciprocals` otherwise, see there)
 *   FP8         in float32: scale = amax / max, 1 when that is 0; element = x / scale
 *   blockwise   2^-e with 2^e = 448 / amax in float32, less its fraction; element = x * 2^e, exact
 *
 * Elements saturate. With a NaN or an infinity in it a block, or for NVFP4 and FP8 the tensor, stands for
 * values of which none, or not all, are finite.
 * Throws ShapeError when the blocks do not divide the shape, UsageError for an option of another format.
 */
export function quantizeScaled(
  values: Float32Array, shape: readonly number[], format: ScaledFormat, options: ScaledOptions = {},
): Scaled {
  checkOptions(format, options);
  if (values.length !== sizeOf(shape)) {
    throw new ShapeError(`${format}: [${shape}] holds ${sizeOf(shape)} elements, found ${values.length}.`);
  }
  const layout = SCALED_LAYOUTS[format];
  const scaleShape = scaleShapeOf(format, shape, options);
  const codes = new Uint8Array(values.length);
  const scales = layout.scale === "f32"
    ? new Float32Array(sizeOf(scaleShape)).fill(1) : new Uint8Array(sizeOf(scaleShape));
  const element = ELEMENTS[layout.element];
  const { random } = options;
  const encode = (x: number, i: number) =>
    random ? encodeStochastic(layout.element, x, random(i)) : element.encode(x);
  let global: number | null = null;
  let encoding = 1;
  let whole = 0;
  if (layout.global) {
    const range = options.fourOverSix ? NVFP4_RANGE.fourOverSix : NVFP4_RANGE.six;
    whole = largest(values, 0, values.length);
    encoding = Math.min(fround(range / whole), FLT_MAX);
    if (whole === 0 || encoding === 0) encoding = 1;
    global = options.reciprocals ? fround(1 / encoding)
      : fround(options.tensorScale ?? fround(whole / range));
  }
  forBlocks(format, shape, options, (number, rows) => {
    const amax = rows.reduce((most, [start, end]) => worse(most, largest(values, start, end)), 0);
    // `factor` is what elements are divided by; powers of two divide exactly, in float64.
    let factor: number;
    let multiplier = 1;
    if (layout.scale === "e8m0") {
      scales[number] = mxScale(amax, element, options.scaleRule ?? "floor");
      factor = e8m0ToF32(scales[number]!);
    } else if (options.reciprocals) {
      const scale = fround(amax * fround(encoding * fround(1 / 6)));
      scales[number] = f32ToE4m3(Math.min(scale, FLT_MAX));
      multiplier = Math.min(fround(1 / fround(e4m3ToF32(scales[number]!) * global!)), FLT_MAX);
      factor = 1;
    } else if (layout.scale === "e4m3fn") {
      scales[number] = options.fourOverSix
        ? closerScale(values, rows[0]!, amax, global!, options.fourOverSix) : nvfp4Scale(amax, global!);
      factor = fround(e4m3ToF32(scales[number]!) * global!);
    } else if (layout.block) {
      scales[number] = factor = blockwiseScale(amax, element.max);
    } else {
      const scale = options.tensorScale ?? amax / element.max;
      scales[number] = factor = fround(scale) === 0 ? 1 : fround(scale);
    }
    const exact = layout.block !== null && layout.scale !== "e4m3fn";
    const divisor = factor === 0 ? Infinity : factor;
    for (const [start, end] of rows) {
      for (let i = start; i < end; i++) {
        const quotient = values[i]! * multiplier / divisor;
        codes[i] = encode(exact ? quotient : fround(quotient), i);
      }
    }
  });
  return {
    format, shape: [...shape], codes, scales, scaleShape, global,
    ...(options.reciprocals ? { reciprocals: true } : {}),
  };
}

/**
 * The values that codes and scales stand for: element * scale is exact, the product with g rounds once. With
 * `reciprocals` scale * g is rounded first, as it was for the codes; on a device g comes last for all.
 */
export function dequantizeScaled(
  { format, shape, codes, scales, scaleShape, global, reciprocals = false }: Scaled,
): Float32Array {
  const layout = SCALED_LAYOUTS[format];
  const { decode } = ELEMENTS[layout.element];
  const table = Float64Array.from({ length: 2 ** ELEMENTS[layout.element].bits }, (_, code) => decode(code));
  const values = new Float32Array(codes.length);
  const options = {
    perRow: layout.block === null && scaleShape.length > 0,
    blockRows: shape.at(-2) === scaleShape.at(-2) ? 1 : 128,
  } as const;
  forBlocks(format, shape, options, (number, rows) => {
    const code = scales[number]!;
    const scale = layout.scale === "f32" ? code : ELEMENTS[layout.scale].decode(code);
    for (const [start, end] of rows) {
      const [first, last] = reciprocals ? [fround(scale * global!), 1] : [scale, global ?? 1];
      for (let i = start; i < end; i++) values[i] = table[codes[i]!]! * first * last;
    }
  });
  return values;
}

/** Two codes of 4 bits per byte, the even column in the low half. Throws ShapeError for an odd width. */
export function packNibbles(codes: Uint8Array, width: number): Uint8Array {
  if (width % 2 !== 0) throw new ShapeError(`packed codes: expected rows of even width, found ${width}.`);
  return Uint8Array.from({ length: codes.length / 2 }, (_, i) => codes[2 * i]! | (codes[2 * i + 1]! << 4));
}

/** The codes in the halves of bytes, the low half first. */
export function unpackNibbles(bytes: Uint8Array): Uint8Array {
  return Uint8Array.from({ length: 2 * bytes.length }, (_, i) => (bytes[i >> 1]! >>> (4 * (i & 1))) & 15);
}

/** Calls `body` for every block with the runs of elements that make it up. */
function forBlocks(
  format: ScaledFormat, shape: readonly number[], options: ScaledOptions,
  body: (block: number, rows: readonly (readonly [start: number, end: number])[]) => void,
): void {
  const [high, wide] = blockOf(format, shape, options);
  const width = shape.at(-1) ?? 1;
  const count = sizeOf(shape) / Math.max(high * wide, 1);
  const across = Math.max(width / wide, 1);
  for (let number = 0; number < count; number++) {
    const first = Math.floor(number / across) * high * width + (number % across) * wide;
    body(number, Array.from({ length: high }, (_, r) =>
      [first + r * width, first + r * width + wide] as const));
  }
}

/** The larger of two magnitudes; NaN where one of them is. */
function worse(a: number, b: number): number {
  return a > b || Number.isNaN(a) ? a : b;
}

function largest(values: Float32Array, start: number, end: number): number {
  let most = 0;
  for (let i = start; i < end; i++) most = worse(most, Math.abs(values[i]!));
  return most;
}

/** The E8M0 code of an MX block. */
function mxScale(amax: number, { max, emax }: Element, rule: ScaleRule): number {
  if (amax === 0) return 0;
  if (Number.isNaN(amax)) return 255;
  if (amax === Infinity) return 254;
  // log2 of a float32 is no whole number by rounding alone, but its neighbours' might be: use the bits.
  bitsF32[0] = amax;
  const bits = bitsU32[0]!;
  const power = bits >= 0x800000 ? (bits >>> 23) - 127 : 31 - Math.clz32(bits) - 149;
  const fits = rule === "floor" || amax <= max * 2 ** (power - emax);
  const e = fits ? power - emax : power - emax + 1;
  return Math.min(Math.max(e, -E8M0_LIMIT), E8M0_LIMIT) + E8M0_LIMIT;
}

/** The E4M3 code of an NVFP4 block, mapping amax to `top`. */
function nvfp4Scale(amax: number, global: number, top = 6): number {
  return global === 0 ? 0 : f32ToE4m3(fround(fround(amax / top) / global));
}

/** The scale code, of those that map amax to 6 and to 4, whose values are closer; on a tie the former. */
function closerScale(
  values: Float32Array, [start, end]: readonly [number, number], amax: number, global: number,
  measure: "absolute" | "squared",
): number {
  const [normal, fine] = [nvfp4Scale(amax, global), nvfp4Scale(amax, global, 4)];
  const errorOf = (code: number): number => {
    const scale = e4m3ToF32(code);
    const factor = fround(scale * global);
    let sum = 0;
    for (let i = start; i < end; i++) {
      const element = factor === 0 ? 0 : e2m1ToF32(f32ToE2m1(fround(values[i]! / factor)));
      const difference = Math.abs(fround(values[i]! - fround(element * scale * global)));
      sum = fround(sum + (measure === "absolute" ? difference : fround(difference * difference)));
    }
    return sum;
  };
  return errorOf(fine) < errorOf(normal) ? fine : normal;
}

/** 2^-e with 2^e the power of two below max / amax; 1 for zeros and what is not finite. */
function blockwiseScale(amax: number, max: number): number {
  if (amax === 0 || !Number.isFinite(amax)) return 1;
  // At least 2^-126, so that no adapter takes the scale for zero.
  bitsF32[0] = Math.min(fround(max / amax), 2 ** 126);
  return 2 ** -((bitsU32[0]! >>> 23) - 127);
}

function checkOptions(format: ScaledFormat, options: ScaledOptions): void {
  const { scale, block } = SCALED_LAYOUTS[format];
  const fits: Readonly<Record<string, boolean>> = {
    scaleRule: scale === "e8m0", tensorScale: scale === "e4m3fn" || !block, fourOverSix: format === "nvfp4",
    perRow: !block, blockRows: format === "fp8_blockwise", reciprocals: scale === "e4m3fn",
  };
  for (const [key, applies] of Object.entries(fits)) {
    if (options[key as keyof ScaledOptions] !== undefined && !applies) {
      throw new UsageError(`${format}: the option ${key} is for other formats.`);
    }
  }
  const { tensorScale } = options;
  for (const other of ["tensorScale", "fourOverSix"] as const) {
    if (options.reciprocals && options[other] !== undefined) {
      throw new UsageError(`${format}: the options reciprocals and ${other} do not go together.`);
    }
  }
  if (tensorScale !== undefined && !(fround(tensorScale) > 0 && Number.isFinite(fround(tensorScale)))) {
    throw new UsageError(`${format}: tensorScale must be positive and finite, found ${tensorScale}.`);
  }
}
