import { bf16ToF32, e4m3ToF32, f32ToBf16, f32ToE4m3 } from "../tensor/dtype.ts";
import { dequantizeScaled, quantizeScaled, type ScaledFormat,
  type ScaledOptions } from "../tensor/formats.ts";
import { type NdArray, ndarray } from "../tensor/ndarray.ts";
import { randomBits } from "../tensor/philox.ts";

interface Options {
  readonly format: string;
  readonly blocks?: "rows" | "columns" | "tiles";
  readonly hadamard?: boolean;
  readonly random?: {
    readonly counter: NdArray; readonly stream: number; readonly apart?: number;
    readonly place?: { readonly table: NdArray; readonly lines: number; readonly whole: number };
  };
  readonly groups?: {
    readonly offsets: NdArray; readonly permute?: { readonly slot_token: NdArray; readonly topk: number };
  } | null;
  readonly given?: { readonly scales: NdArray; readonly slot: number };
  readonly scale_rule?: "floor" | "ceil";
  readonly whole_scale?: boolean;
}

const BLOCK: Readonly<Record<string, number>> = {
  fp8_blockwise: 128, mxfp8_e4m3: 32, mxfp8_e5m2: 32, mxfp4: 32, nvfp4: 16,
};
/** Where the Hadamard transform changes the sign of its input first. */
const SIGNS = 0xd7e8;
const { fround } = Math;
const bf16 = (x: number) => bf16ToF32(f32ToBf16(x));

/** decode(encode(x / scale)) * scale in a format, rows of x along the last dimension. */
export function fake_quantize(x: NdArray, options: Options): NdArray {
  const { format, groups, hadamard } = options;
  const cols = x.shape.at(-1)!;
  const blocks = BLOCK[format] === undefined ? "tensor" : options.blocks ?? "rows";
  let rows: Float64Array[] = Array.from({ length: x.data.length / cols },
    (_, r) => x.data.slice(r * cols, (r + 1) * cols));
  const block = BLOCK[format] ?? 1;
  if (groups) rows = grouped(rows, groups, hadamard ? 16 : block, cols);
  if (hadamard) rows = rotated(rows, cols);
  const shape = groups || hadamard ? [rows.length, cols] : x.shape;
  // Blocks lie along lines; the last of a line may be shorter, as if zeros followed.
  const [high, wide] = blocks === "columns" ? [cols, rows.length] : [rows.length, cols];
  const deep = blocks === "tensor" ? wide : Math.ceil(wide / block) * block;
  const tall = blocks === "tiles" ? Math.ceil(high / block) * block : high;
  const lines = new Float32Array(tall * deep);
  rows.forEach((row, r) => row.forEach((value, c) => {
    lines[blocks === "columns" ? c * deep + r : r * deep + c] = value;
  }));
  const values = format === "bf16" ? lines.map(bf16) : scaled(lines, [tall, deep], blocks, options);
  return ndarray(shape, Float64Array.from({ length: rows.length * cols }, (_, i) => {
    const [r, c] = [Math.floor(i / cols), i % cols];
    return values[blocks === "columns" ? c * deep + r : r * deep + c]!;
  }));
}

/** offsets with every group filled up to a multiple. */
export function padded_offsets(offsets: NdArray, multiple: number): NdArray {
  const padded = ndarray(offsets.shape);
  for (let e = 1; e < padded.data.length; e++) {
    const rows = offsets.data[e]! - offsets.data[e - 1]!;
    padded.data[e] = padded.data[e - 1]! + Math.ceil(rows / multiple) * multiple;
  }
  return padded;
}

function scaled(
  lines: Float32Array, shape: [number, number], blocks: string, options: Options,
): Float32Array {
  const { format, random, given, scale_rule, whole_scale } = options;
  if (whole_scale) return wholeScales(lines, shape, blocks);
  const name = format === "nvfp4" && blocks === "tiles" ? "nvfp4_16x16" : format;
  const key = random && { seed: seedOf(random.counter), step: random.counter.data[2]!,
    stream: random.stream };
  // As lines of whole words of four bytes; blocks of 16 make that so.
  const byte = (own: number) => {
    const i = 16 * elementBlock(Math.floor(own / 16), shape[1] / 16, blocks, random!) + own % 16;
    const word = Math.floor(i / 4) + 2 ** 34 * (random!.apart ?? 0);
    return (randomBits(key!, word) >>> (8 * (i % 4))) & 255;
  };
  const more: ScaledOptions = {
    ...(key ? { random: byte } : {}), ...(given ? { tensorScale: given.scales.data[given.slot]! } : {}),
    ...(format.startsWith("mx") ? { scaleRule: scale_rule ?? "ceil" } : {}),
    ...(format === "fp8_blockwise" ? { blockRows: blocks === "tiles" ? 128 as const : 1 as const } : {}),
  };
  return dequantizeScaled(quantizeScaled(lines, shape, name as ScaledFormat, more));
}

/** The number of a block of 16 in the matrix whose elements draw random bits. */
function elementBlock(
  block: number, across: number, blocks: string, { place }: NonNullable<Options["random"]>,
): number {
  if (!place) return block;
  const { table: { data }, lines, whole } = place;
  const [line, along] = [Math.floor(block / across), block % across];
  if (blocks !== "columns") return (lines ? data[line]! : line) * whole + data[lines + along]!;
  const column = 16 * data[lines + Math.floor(line / 16)]! + line % 16;
  return column * whole + (lines ? data[along]! : along);
}

const seedOf = (counter: NdArray) => BigInt(counter.data[0]!) + (BigInt(counter.data[1]!) << 32n);

/** E4M3 in blocks of 128 (x 128 for tiles) with scales amax / 448. */
function wholeScales(lines: Float32Array, [tall, deep]: [number, number], blocks: string): Float32Array {
  const high = blocks === "tiles" ? 128 : 1;
  const values = new Float32Array(lines.length);
  for (let r = 0; r < tall; r += high) {
    for (let c = 0; c < deep; c += 128) {
      const own = Array.from({ length: high * 128 }, (_, i) => (r + (i >> 7)) * deep + c + (i & 127));
      const amax = own.reduce((most, i) => Math.max(most, Math.abs(lines[i]!)), 0);
      const scale = amax === 0 ? 1 : fround(amax / 448);
      for (const i of own) values[i] = e4m3ToF32(f32ToE4m3(fround(lines[i]! / scale), true)) * scale;
    }
  }
  return values;
}

function grouped(
  rows: Float64Array[], { offsets, permute }: NonNullable<Options["groups"]>, block: number, cols: number,
): Float64Array[] {
  const all = rows.length * (permute?.topk ?? 1);
  const experts = offsets.data.length - 1;
  const most = Math.min(all, Math.floor((all + experts * (block - 1)) / block)) * block;
  const result: Float64Array[] = Array.from({ length: most }, () => new Float64Array(cols));
  const begin = padded_offsets(offsets, block).data;
  for (let e = 0; e < experts; e++) {
    for (let s = offsets.data[e]!; s < offsets.data[e + 1]!; s++) {
      const from = permute ? Math.floor(permute.slot_token.data[s]! / permute.topk) : s;
      result[begin[e]! + s - offsets.data[e]!] = rows[from]!;
    }
  }
  return result;
}

/** Columns in 16 rows at a time: times the signs and H / 4, by sums of rows 1, 2, 4 and 8 apart in f32. */
export function rotated(rows: Float64Array[], cols: number): Float64Array[] {
  const result = Array.from({ length: Math.ceil(rows.length / 16) * 16 }, (_, r) =>
    rows[r] ? Float64Array.from(rows[r], (v) => ((SIGNS >> (r % 16)) & 1 ? -v : v)) : new Float64Array(cols));
  for (let first = 0; first < result.length; first += 16) {
    for (let apart = 1; apart < 16; apart *= 2) {
      for (let i = 0; i < 16; i++) {
        if (i & apart) continue;
        const [a, b] = [result[first + i]!, result[first + i + apart]!];
        for (let c = 0; c < cols; c++) {
          const [u, v] = [a[c]!, b[c]!];
          a[c] = fround(u + v);
          b[c] = fround(u - v);
        }
      }
    }
  }
  for (const row of result) row.forEach((value, c) => {
    row[c] = bf16(value / 4);
  });
  return result;
}

const bits = new DataView(new ArrayBuffer(4));

/** In place; see the op. */
export function update_scales(
  magnitudes: NdArray, history: NdArray, scales: NdArray, tops: NdArray, counter: NdArray,
): NdArray[] {
  const [slots, length] = history.shape as [number, number];
  const entries = magnitudes.shape[1]!;
  for (let slot = 0; slot < slots; slot++) {
    const own = magnitudes.data.subarray(slot * entries, (slot + 1) * entries);
    bits.setUint32(0, own.reduce((a, b) => Math.max(a, b), 0));
    const newest = bits.getFloat32(0);
    const row = history.data.subarray(slot * length, (slot + 1) * length);
    row[counter.data[3]! % length] = Number.isFinite(newest) ? newest : 0;
    const scale = fround(row.reduce((a, b) => Math.max(a, b), 0) / tops.data[slot]!);
    if (scale > 0) scales.data[slot] = scale;
    own.fill(0);
  }
  return [];
}
