import type { Device } from "./device.ts";
import { DTypeError, ShapeError } from "./errors.ts";
import { type Scaled, type ScaledFormat, SCALED_LAYOUTS, packNibbles } from "./formats.ts";
import { sizeOf } from "./ndarray.ts";
import { register, unscoped } from "./scope.ts";
import type { Tensor } from "./tensor.ts";

/**
 * Number formats of matrices on the device whose values are packed codes with scales beside them.
 *
 *   q8  signed codes of 8 bits, an f16 scale for 32 neighbours: 8.5 bits per value
 *   q4  codes of 4 bits, value = (code - 8) * scale, an f16 scale for 32 neighbours: 4.5 bits per value
 *   mxfp8_e4m3, mxfp8_e5m2, mxfp4, nvfp4, fp8_e4m3, fp8_e5m2, fp8_blockwise  as in src/tensor/formats.ts:
 *       8.25, 8.25, 4.25, 4.5, 8, 8 and 8.25 bits per value. Tiles of several rows are stored as the
 *       scales of each of their rows, so that nvfp4_16x16 is held as nvfp4.
 */
export type BlockFormat = "q8" | "q4" | Exclude<ScaledFormat, "nvfp4_16x16">;

/** How a format lies in memory: shaders/lib/blocks.wgsl decodes it. */
export interface BlockLayout {
  /** Bits of one code. */
  readonly bits: number;
  /** Neighbours that share a scale; where a matrix or a row does, what the width is a multiple of. */
  readonly block: number;
  /**
   * f16 and f32: one per block. bytes: codes of E8M0 or E4M3, packed four to a word, blocks of all rows one
   * after another. rows: f32, one for everything, one per matrix of a stack, or one per row.
   */
  readonly scale: "f16" | "bytes" | "f32" | "rows";
  /** A further f32 scale for everything, or one per matrix of a stack. */
  readonly global: boolean;
}

export const BLOCK_LAYOUTS: Readonly<Record<BlockFormat, BlockLayout>> = {
  q8: { bits: 8, block: 32, scale: "f16", global: false },
  q4: { bits: 4, block: 32, scale: "f16", global: false },
  mxfp8_e4m3: { bits: 8, block: 32, scale: "bytes", global: false },
  mxfp8_e5m2: { bits: 8, block: 32, scale: "bytes", global: false },
  mxfp4: { bits: 4, block: 32, scale: "bytes", global: false },
  nvfp4: { bits: 4, block: 16, scale: "bytes", global: true },
  fp8_e4m3: { bits: 8, block: 16, scale: "rows", global: false },
  fp8_e5m2: { bits: 8, block: 16, scale: "rows", global: false },
  fp8_blockwise: { bits: 8, block: 128, scale: "f32", global: false },
};

export function isBlockFormat(name: string): name is BlockFormat {
  return Object.hasOwn(BLOCK_LAYOUTS, name);
}

/** Words that hold the codes of `size` values. */
export function codeWords(size: number, format: BlockFormat): number {
  return (size * BLOCK_LAYOUTS[format].bits) / 32;
}

/** Bits per value with its part of the block's scale; scales of rows and matrices are not counted. */
export function bitsPerValue(format: BlockFormat): number {
  const { bits, block, scale } = BLOCK_LAYOUTS[format];
  return bits + { f16: 16, bytes: 8, f32: 32, rows: 0 }[scale] / block;
}

/** The shape of the scales of a matrix or stack; for formats with one per row, of the smallest: [1]. */
export function blockScaleShape(shape: readonly number[], format: BlockFormat): number[] {
  const { block, scale } = BLOCK_LAYOUTS[format];
  const lead = shape.slice(0, -1);
  const width = (shape.at(-1) ?? 0) / block;
  if (scale === "rows") return [1];
  return scale === "bytes" ? [Math.ceil((sizeOf(lead) * width) / 4)] : [...lead, width];
}

/** Codes and scales as files hold them. */
export interface RawBlocks {
  /** Codes in row-major order: one byte each, or two of 4 bits to a byte, the even column in the low half. */
  readonly codes: Uint8Array;
  /**
   * E8M0 or E4M3 codes, one byte per block; or f32: for fp8_blockwise one per block of 128, for fp8_e4m3 and
   * fp8_e5m2 one for everything, one per matrix of a stack, or one per row.
   */
  readonly scales: Uint8Array | Float32Array;
  /** NVFP4: the tensor's scale, or one per matrix of a stack. */
  readonly global?: number | Float32Array | null;
  /** Whether values are divided by the tensor's scale. */
  readonly divides?: boolean;
  /** Name of the tensor in errors. */
  readonly name?: string;
}

/**
 * A matrix [N, K], or a stack of them [E, N, K], whose values are packed codes with a scale per block.
 * Made by `quantize`, or from what a file holds by `BlockTensor.fromCodes`; products, `embedding` and
 * `dequantize` read it. Like a tensor it belongs to the scope that made it, or to its maker outside of every
 * scope.
 */
export class BlockTensor {
  readonly shape: readonly number[];
  readonly format: BlockFormat;
  /** u32 [..., K * bits / 32] */
  readonly codes: Tensor;
  /**
   * f16 or f32 [..., K / block]; u32 [ceil(blocks / 4)] of packed bytes; or f32 [1], [E], [N] or [E * N].
   */
  readonly scales: Tensor;
  /** f32 [1] or [E], the factor of sums; null for formats without. */
  readonly global: Tensor | null;
  /** f32 [1] or [E] where values are divided by the tensor's scale; `global` holds its reciprocal. */
  readonly divisor: Tensor | null;
  /** Quantised weights are not trained. */
  readonly requiresGrad = false;
  #refs = 1;

  /** Internal: use `quantize`. Takes over one reference to each part, beside any that a scope holds. */
  constructor(
    shape: readonly number[], format: BlockFormat, codes: Tensor, scales: Tensor,
    global: Tensor | null = null, divisor: Tensor | null = null,
  ) {
    this.shape = [...shape];
    this.format = format;
    this.codes = codes;
    this.scales = scales;
    this.global = global;
    this.divisor = divisor;
    register(this);
  }

  /**
   * A tensor from codes and scales that were made elsewhere, bit for bit.
   *
   * @param shape  [N, K] or [E, N, K]; K a multiple of the format's block
   * @throws ShapeError when codes or scales do not fit the shape, DTypeError for scales of the wrong kind,
   *   for a code or a scale that is NaN, and for one that is infinite
   */
  static fromCodes(
    device: Device, format: Exclude<BlockFormat, "q8" | "q4">, shape: readonly number[], raw: RawBlocks,
  ): BlockTensor {
    checkRaw(format, shape, raw);
    const { scale, global } = BLOCK_LAYOUTS[format];
    const width = shape.at(-1)!;
    const make = (values: Uint32Array | Float32Array, of: readonly number[]) =>
      unscoped(() => device.tensor(values, of));
    const codes = make(wordsOf(raw.codes), [...shape.slice(0, -1), codeWords(width, format)]);
    const scales = scale === "bytes"
      ? make(wordsOf(raw.scales as Uint8Array), [Math.ceil(raw.scales.length / 4)])
      : make(raw.scales as Float32Array,
        scale === "rows" ? [raw.scales.length] : blockScaleShape(shape, format));
    const list = globalList(raw);
    const of = (values: Float32Array) => (global ? make(values, [list.length]) : null);
    if (!raw.divides) return new BlockTensor(shape, format, codes, scales, of(list));
    return new BlockTensor(shape, format, codes, scales, of(list.map((each) => 1 / each)), of(list));
  }

  /** A tensor quantised on the host, tiles of several rows too: see `fromCodes`. */
  static fromScaled(device: Device, scaled: Scaled): BlockTensor {
    const { shape, scaleShape, scales, codes, global } = scaled;
    const format = scaled.format === "nvfp4_16x16" ? "nvfp4" : scaled.format;
    const { block } = SCALED_LAYOUTS[scaled.format];
    // A tile's scale is that of each of its rows.
    const rows = block && scaleShape.length > 1 ? shape.at(-2)! / scaleShape.at(-2)! : 1;
    const across = scaleShape.at(-1) ?? 1;
    const spread = rows === 1 ? scales : expand(scales, across, rows);
    const packed = BLOCK_LAYOUTS[format].bits === 4 ? packNibbles(codes, shape.at(-1)!) : codes;
    return BlockTensor.fromCodes(device, format, shape, { codes: packed, scales: spread, global });
  }

  get device(): Device {
    return this.codes.device;
  }

  /** Number of values. */
  get size(): number {
    return (this.codes.size * 32) / BLOCK_LAYOUTS[this.format].bits;
  }

  get byteLength(): number {
    const more = (this.global?.byteLength ?? 0) + (this.divisor?.byteLength ?? 0);
    return this.codes.byteLength + this.scales.byteLength + more;
  }

  retain(): this {
    this.#refs++;
    return this;
  }

  /** Drops one reference; the memory goes back to the pool with the last. */
  release(): void {
    if (--this.#refs === 0) {
      this.codes.release();
      this.scales.release();
      this.global?.release();
      this.divisor?.release();
    }
    if (this.#refs < 0) {
      throw new Error(`A block tensor [${this.shape}] was released more often than it was retained.`);
    }
  }

  /** Gives up the owner's reference, for tensors that no scope owns (parameters). */
  dispose(): void {
    this.release();
  }
}

/** Every run of `across` scales `rows` times. */
function expand<A extends Uint8Array | Float32Array>(scales: A, across: number, rows: number): A {
  const out = new (scales.constructor as new (length: number) => A)(scales.length * rows);
  for (let at = 0; at < scales.length; at += across) {
    for (let r = 0; r < rows; r++) out.set(scales.subarray(at, at + across), at * rows + r * across);
  }
  return out;
}

/** Bytes as little-endian words, the last filled up with zeros. */
function wordsOf(bytes: Uint8Array): Uint32Array {
  const padded = new Uint8Array(Math.ceil(bytes.length / 4) * 4);
  padded.set(bytes);
  return new Uint32Array(padded.buffer);
}

function globalList({ global }: RawBlocks): Float32Array {
  return global instanceof Float32Array ? global : Float32Array.of(global ?? 1);
}

function checkRaw(format: BlockFormat, shape: readonly number[], raw: RawBlocks): void {
  const { bits, block, scale, global } = BLOCK_LAYOUTS[format];
  const what = raw.name === undefined ? format : `tensor "${raw.name}": ${format}`;
  const shown = `[${shape.join(", ")}]`;
  if ((shape.length !== 2 && shape.length !== 3) || shape.at(-1)! % block !== 0) {
    throw new ShapeError(
      `${what}: expected a matrix or a stack of them, rows of a multiple of ${block}, found ${shown}.`);
  }
  const codes = (sizeOf(shape) * bits) / 8;
  if (raw.codes.length !== codes) {
    const found = raw.codes.length;
    throw new ShapeError(`${what}: expected ${codes} bytes of codes for ${shown}, found ${found}.`);
  }
  const matrices = shape.length === 3 ? shape[0]! : 1;
  const rows = sizeOf(shape.slice(0, -1));
  const counts = scale === "rows" ? [1, matrices, rows] : [(rows * shape.at(-1)!) / block];
  if (!counts.includes(raw.scales.length)) {
    const expected = [...new Set(counts)].join(" or ");
    throw new ShapeError(`${what}: expected ${expected} scales for ${shown}, found ${raw.scales.length}.`);
  }
  if (raw.scales instanceof Uint8Array !== (scale === "bytes")) {
    throw new DTypeError(
      `${what}: expected scales as ${scale === "bytes" ? "bytes" : "float32"}, found the other.`);
  }
  const nanCode = format === "nvfp4" ? 0x7f : 0xff;
  raw.scales.forEach((value, i) => {
    const isNan = scale === "bytes" ? value === nanCode || (nanCode === 0x7f && value > 0x7e)
      : !Number.isFinite(value);
    if (isNan) throw new DTypeError(`${what}: expected finite scales, found code or value ${value} at ${i}.`);
  });
  const list = globalList(raw);
  if (global && list.length !== 1 && list.length !== matrices) {
    throw new ShapeError(
      `${what}: expected 1${matrices > 1 ? ` or ${matrices}` : ""} tensor scales, found ${list.length}.`);
  }
  if (global && !list.every(Number.isFinite)) {
    throw new DTypeError(`${what}: expected a finite tensor scale, found ${list.join(", ")}.`);
  }
  if (bits !== 8) return;
  const most = format.endsWith("e5m2") ? 0x7b : 0x7e;
  const bad = raw.codes.findIndex((code) => (code & 0x7f) > most);
  if (bad >= 0) throw new DTypeError(`${what}: expected finite codes, found ${raw.codes[bad]} at ${bad}.`);
}
