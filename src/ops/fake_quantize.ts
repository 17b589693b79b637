/**
 * Values as a low-precision format keeps them, in f32: what training in the format multiplies. A product of
 * two such tensors is the block-scaled product of the format up to the order of its f32 additions.
 */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";
import { unscoped } from "../tensor/scope.ts";
import { Tensor } from "../tensor/tensor.ts";
import { groupedTiles } from "./gemm.ts";
import { defineOp } from "./op.ts";

/** Formats of src/tensor/formats.ts that training emulates, and bf16. nvfp4 in tiles is nvfp4_16x16. */
export type FakeFormat =
  | "bf16" | "fp8_e4m3" | "fp8_e5m2" | "fp8_blockwise" | "mxfp8_e4m3" | "mxfp8_e5m2" | "mxfp4" | "nvfp4";
/** Where the elements of a block lie: in a row, in a column, or in a square of both. */
export type BlockShape = "rows" | "columns" | "tiles";

type Condition =
  | "bf16" | "e4m3" | "e5m2" | "tensor_scale" | "nvfp4" | "e8m0" | "block_scale" | "columns" | "square"
  | "grouped" | "gather" | "given" | "stochastic" | "placed" | "floor_scale" | "whole_scale" | "vec4"
  | "jobs";

interface Layout {
  readonly conditions: readonly Condition[];
  /** Elements of a block along its direction; null where the tensor is one block. */
  readonly block: number | null;
  /** Whether a scale follows from the tensor's largest magnitude. */
  readonly scaled: boolean;
}

export const FAKE_LAYOUTS: Readonly<Record<FakeFormat, Layout>> = {
  bf16: { conditions: ["bf16"], block: null, scaled: false },
  fp8_e4m3: { conditions: ["e4m3", "tensor_scale"], block: null, scaled: true },
  fp8_e5m2: { conditions: ["e5m2", "tensor_scale"], block: null, scaled: true },
  fp8_blockwise: { conditions: ["e4m3", "block_scale"], block: 128, scaled: false },
  mxfp8_e4m3: { conditions: ["e4m3", "e8m0"], block: 32, scaled: false },
  mxfp8_e5m2: { conditions: ["e5m2", "e8m0"], block: 32, scaled: false },
  mxfp4: { conditions: ["e8m0"], block: 32, scaled: false },
  nvfp4: { conditions: ["nvfp4"], block: 16, scaled: true },
};

/** Rows in groups: blocks along columns start anew in each. */
export interface RowGroups {
  /** u32 [groups + 1], ascending from 0 to the number of rows. */
  readonly offsets: Tensor;
  /** Row s of what is grouped is row floor(slot_token[s] / topk) of x, as in `grouped_linear`. */
  readonly permute?: { readonly slot_token: Tensor; readonly topk: number } | undefined;
}

export interface FakeQuantizeOptions {
  readonly format: FakeFormat;
  /** Default "rows". Formats with one scale for the tensor take no notice. */
  readonly blocks?: BlockShape;
  /** Columns alone: the random Hadamard transform of 16 rows first, rounded to bf16. */
  readonly hadamard?: boolean;
  /** nvfp4 in rows or columns: rounds at random. */
  readonly random?: RandomSource | undefined;
  /** Columns alone. */
  readonly groups?: RowGroups | null;
  /** fp8_e4m3, fp8_e5m2: value number `slot` of f32 `scales` as the scale, instead of amax / max. */
  readonly given?: { readonly scales: Tensor; readonly slot: number } | undefined;
  /** MX formats: "ceil" (default) is the least scale that avoids saturation, "floor" that of OCP. */
  readonly scale_rule?: "floor" | "ceil" | undefined;
  /** fp8_blockwise: amax / 448 as it is, instead of a power of two. */
  readonly whole_scale?: boolean | undefined;
}

/** Random bits for a tensor: those of Philox under the key (seed, stream, step). */
export interface RandomSource {
  /** u32 [at least 3]: seed low, seed high, step. A captured step reads them at every replay. */
  readonly counter: Tensor;
  readonly stream: number;
  /** Tells tensors of one key apart; default 0. */
  readonly apart?: number;
  /** Where x stands in a larger matrix, whose elements draw the bits; default: it is all of it. */
  readonly place?: Place | null;
}

/** Where the blocks of a matrix stand in one of which it is a part: whole blocks of 16 of that. */
export interface Place {
  /**
   * u32: of every row of x (of "columns": of every block of 16 rows) its number there, if `lines` is not 0;
   * then of every block of 16 columns.
   */
  readonly table: Tensor;
  /** Rows, or blocks of rows, in the table; 0: x has all of them. */
  readonly lines: number;
  /** Blocks of 16 there are in a row there (of "columns": in a column). */
  readonly whole: number;
}

/** Largest magnitudes of stretches of a tensor: entries `first` .. `first + count` of u32 bits. */
export interface Magnitudes {
  readonly partial: Tensor;
  readonly first: number;
  readonly count: number;
}

/** Invocations of a workgroup, workgroups that fill the adapter, and most entries of magnitudes. */
const SPREAD = {
  software: { WG: 16, groups: 16, partials: 16 }, hardware: { WG: 64, groups: 4096, partials: 64 },
} as const;

export function spreadOf(device: Device) {
  return SPREAD[device.info.isSoftware ? "software" : "hardware"];
}

/**
 * What the format keeps of x, element by element an f32: decode(encode(x / scale)) * scale. Rounds to nearest
 * even, or at random with 8 bits per element: element i of the tensor in the order of its blocks (columns
 * first for "columns", lines filled up to multiples of 16) takes byte i % 4 of Philox word floor(i / 4); with
 * a `place` i is the element's number in the larger matrix.
 *
 * @param x  f32 [..., K], taken as rows of K
 * @returns f32 of x's shape; with `hadamard` or `groups` [rows, K], where rows are filled up with zeros to
 *   whole blocks: of each group, and for groups up to the most there can be
 * @throws UsageError for options that do not go together
 */
export const fake_quantize = defineOp({
  name: "fake_quantize",
  forward(_ctx, x: Tensor, options: FakeQuantizeOptions): Tensor {
    checkOptions(options);
    const { groups = null, format } = options;
    if (options.hadamard) {
      const { rotated, own } = rotateColumns(x, groups);
      return fakeValues(rotated, { ...options, groups: null }, own);
    }
    const scaled = FAKE_LAYOUTS[format].scaled && !options.given;
    return fakeValues(x, options, scaled ? largestMagnitude(x) : null);
  },
});

/**
 * Where groups of rows begin when each is filled up to a multiple.
 *
 * @param offsets  u32 [groups + 1], ascending from 0
 * @returns u32 [groups + 1]
 */
export const padded_offsets = defineOp({
  name: "padded_offsets",
  forward(_ctx, offsets: Tensor, multiple: number): Tensor {
    check(offsets.shape.length === 1 && offsets.size > 0, "padded_offsets", "offsets", "[groups + 1]",
      offsets);
    const padded = offsets.device.empty(offsets.shape, "u32");
    launch("quant/padded_groups", {
      bind: { offsets, padded }, params: { groups: offsets.size - 1, multiple }, workgroups: [1],
    });
    return padded;
  },
});

function checkOptions(
  { format, blocks = "rows", hadamard, random, groups, given, scale_rule, whole_scale }: FakeQuantizeOptions,
): void {
  const { conditions } = FAKE_LAYOUTS[format];
  const fits: readonly (readonly [boolean, string])[] = [
    [!random || (format === "nvfp4" && blocks !== "tiles"),
      "random rounding is for nvfp4 in rows or columns"],
    [!hadamard || blocks === "columns", "the Hadamard transform is for columns"],
    [!groups || blocks === "columns", "groups are for columns"],
    [!given || conditions.includes("tensor_scale"), "a given scale is for fp8_e4m3 and fp8_e5m2"],
    [!scale_rule || conditions.includes("e8m0"), "scale_rule is for MX formats"],
    [!whole_scale || conditions.includes("block_scale"), "whole_scale is for fp8_blockwise"],
  ];
  for (const [holds, rule] of fits) {
    if (!holds) throw new UsageError(`fake_quantize: ${rule}, found ${format} in ${blocks}.`);
  }
}

/**
 * Largest magnitudes of x, to be handed to `fakeValues`; into `into` where it is given.
 * @param entries how many; default: as many as suit the adapter
 */
export function largestMagnitude(
  x: Tensor, into: { readonly partial: Tensor; readonly first: number } | null = null, entries = 0,
): Magnitudes {
  const { WG, partials } = spreadOf(x.device);
  const units = Math.ceil(x.size / 4);
  const count = entries || Math.max(1, Math.min(partials, Math.ceil(units / (WG * 64))));
  const each = Math.ceil(units / (WG * count));
  const first = into?.first ?? 0;
  const partial = into?.partial ?? x.device.empty([count], "u32");
  launch("quant/largest", {
    entry: "largest", bind: { x, partial, jobs: x },
    params: {
      rows: 1, cols: x.size, block: 0, units, each, groups: count, first, partials: count, per: 1,
    },
    constants: { WG }, workgroups: [count],
    conditions: [
      ...(x.size % 4 === 0 ? ["vec4" as const] : []), ...(into ? ["accumulate" as const] : []),
    ],
  });
  return { partial, first, count };
}

/** Rows in blocks, as `grouped` kernels take them: rows with those that fill up, and the table of blocks. */
function blocksOf(rows: number, block: number, groups: RowGroups | null) {
  if (!groups) return { rows, tiles: null, table: null, per: 1 };
  const { offsets, permute } = groups;
  const all = rows * (permute?.topk ?? 1);
  const tiles = groupedTiles(offsets, all, block);
  return { rows: tiles.shape[0]! * block, tiles, table: permute?.slot_token ?? null,
    per: permute?.topk ?? 1 };
}

/**
 * The columns of x, 16 rows at a time, by the random Hadamard transform; with the magnitudes of both, which
 * lie in one tensor.
 * @param entries of magnitudes, as for `largestMagnitude`
 */
export function rotateColumns(
  x: Tensor, groups: RowGroups | null, entries = 0,
): { rotated: Tensor; plain: Magnitudes; own: Magnitudes } {
  const { device } = x;
  const cols = x.shape.at(-1)!;
  const source = x.size / Math.max(cols, 1);
  const { rows, tiles, table, per } = blocksOf(source, 16, groups);
  const padded = Math.ceil(rows / 16) * 16;
  const rotated = device.empty([padded, cols]);
  const { WG, partials } = spreadOf(device);
  const units = (padded / 16) * Math.ceil(cols / 4);
  const count = entries || Math.max(1, Math.min(partials, Math.ceil(units / (WG * 4))));
  const partial = device.empty([2 * count], "u32");
  launch("quant/largest", {
    entry: "rotate",
    bind: { x, y: rotated, partial, jobs: x, tiles: tiles ?? x, table: table ?? x },
    params: {
      rows, cols, block: 16, units, each: Math.ceil(units / (WG * count)), groups: count, first: 0,
      partials: count, per,
    },
    constants: { WG }, workgroups: [count],
    conditions: [
      ...(cols % 4 === 0 ? ["vec4" as const] : []), ...(tiles ? ["grouped" as const] : []),
      ...(table ? ["gather" as const] : []),
    ],
  });
  return {
    rotated, plain: { partial, first: 0, count }, own: { partial, first: count, count },
  };
}

/**
 * The rounding of `fake_quantize` with magnitudes already known (of x, or of a tensor with the same scale).
 * Takes no notice of `hadamard`.
 */
export function fakeValues(x: Tensor, options: FakeQuantizeOptions, magnitudes: Magnitudes | null): Tensor {
  const { format, blocks = "rows", random, groups = null, given, scale_rule, whole_scale } = options;
  const { block, conditions } = FAKE_LAYOUTS[format];
  const { device } = x;
  const columns = block !== null && blocks === "columns";
  const cols = block === null && !groups ? x.size : x.shape.at(-1)!;
  const source = x.size / Math.max(cols, 1);
  const { rows, tiles, table, per } = blocksOf(source, block ?? 1, columns ? groups : null);
  const y = device.empty(columns && groups ? [rows, cols] : x.shape);
  const strip = block ?? 64;
  const wide = columns ? 4 : strip;
  const high = columns || (block !== null && blocks === "tiles") ? strip : 1;
  const units = Math.ceil(rows / high) * Math.ceil(cols / wide);
  const { WG, groups: wanted } = spreadOf(device);
  const each = Math.max(1, Math.ceil(units / (WG * wanted)));
  const count = Math.ceil(units / (WG * each));
  launch("quant/fake_quantize", {
    bind: {
      x, y, amax: magnitudes?.partial ?? x, jobs: random?.place?.table ?? x, tiles: tiles ?? x,
      table: table ?? x, random: random?.counter ?? x, scales: given?.scales ?? x,
    },
    params: {
      rows, cols, block: strip, units, each, groups: count, first: given?.slot ?? magnitudes?.first ?? 0,
      partials: magnitudes?.count ?? 0, stream: random?.stream ?? 0, per, apart: random?.apart ?? 0,
      whole: random?.place?.whole ?? 0, placed: random?.place?.lines ?? 0,
    },
    constants: { WG }, workgroups: [count],
    conditions: [
      ...conditions, ...shapeConditions(block, blocks), ...(cols % 4 === 0 ? ["vec4" as const] : []),
      ...(tiles ? ["grouped" as const] : []), ...(table ? ["gather" as const] : []),
      ...(random ? ["stochastic" as const] : []), ...(random?.place ? ["placed" as const] : []),
      ...(given ? ["given" as const] : []),
      ...(scale_rule === "floor" ? ["floor_scale" as const] : []),
      ...(whole_scale ? ["whole_scale" as const] : []),
    ],
  });
  return y;
}

/** A matrix, or a stack of them with a scale each, of a batch: x f32 or bf16, y f32 of the same shape. */
export interface FakeJob {
  readonly x: Tensor;
  readonly y: Tensor;
  /** Entries of `given.scales` and of `given.magnitudes`, one per matrix, from here on. */
  readonly slot: number;
}

/** Scales from earlier updates: see `update_scales`. */
export interface GivenScales {
  /** f32 [slots] */
  readonly scales: Tensor;
  /** u32 [slots, entries]: collects largest magnitudes. */
  readonly magnitudes: Tensor;
}

interface Prepared {
  readonly measure: (() => Tensor) | null;
  readonly values: (amax: Tensor | null) => void;
}

/**
 * `fake_quantize` of many matrices at once, of all parameters for one: a launch for the largest magnitudes
 * where the format needs them, and one for the values, as long as the sources lie in one buffer and the
 * results in another.
 */
export class FakeBatch {
  readonly #records: Prepared[] = [];
  readonly #held: Tensor[] = [];

  /** @param entries of magnitudes for every matrix; default: as many as suit the adapter */
  constructor(
    device: Device, jobs: readonly FakeJob[], options: FakeQuantizeOptions, given: GivenScales | null = null,
    entries = 0,
  ) {
    checkOptions(options);
    const groups = new Map<string, FakeJob[]>();
    const numbers = new Map<unknown, number>();
    const number = (storage: unknown) =>
      numbers.get(storage) ?? numbers.set(storage, numbers.size).get(storage)!;
    for (const job of jobs) {
      const key = `${job.x.dtype} ${number(job.x.storage)} ${number(job.y.storage)}`;
      groups.set(key, [...(groups.get(key) ?? []), job]);
    }
    unscoped(() => {
      for (const group of groups.values()) {
        this.#records.push(this.#prepare(device, group, options, given, entries));
      }
    });
  }

  /** Records the launches. */
  record(): void {
    this.values(this.measure());
  }

  /** Records those for the largest magnitudes: a tensor of them for every launch that needs one. */
  measure(): Tensor[] {
    return this.#records.flatMap(({ measure }) => measure?.() ?? []);
  }

  /** Records those for the values. @param magnitudes as `measure` gave them, or larger ones */
  values(magnitudes: readonly Tensor[]): void {
    let next = 0;
    for (const { measure, values } of this.#records) values(measure ? magnitudes[next++] ?? null : null);
  }

  dispose(): void {
    for (const tensor of this.#held) tensor.dispose();
  }

  #prepare(
    device: Device, jobs: readonly FakeJob[], options: FakeQuantizeOptions, given: GivenScales | null,
    entries: number,
  ): Prepared {
    const { format, blocks = "rows" } = options;
    const { block, conditions, scaled } = FAKE_LAYOUTS[format];
    const { WG, groups: wanted, partials } = spreadOf(device);
    const [x, y] = [this.#whole(device, jobs.map((job) => job.x)), this.#whole(
      device, jobs.map((job) => job.y))];
    const halves = x.dtype === "bf16";
    const matrices = jobs.flatMap((job) => {
      const [rows, cols] = job.x.shape.slice(-2) as [number, number];
      return Array.from({ length: job.x.size / (rows * cols) }, (_, i) => ({
        rows, cols, slot: job.slot + i,
        x: (job.x.byteOffset - x.byteOffset) / (halves ? 2 : 4) + i * rows * cols,
        y: (job.y.byteOffset - y.byteOffset) / 4 + i * rows * cols,
      }));
    });
    const wide = matrices.every(({ rows, cols }) => (block === null ? rows * cols : cols) % 4 === 0);
    const high = block !== null && blocks !== "rows" ? block : 1;
    const across = block === null ? 64 : blocks === "columns" ? 4 : block;
    const all = matrices.reduce((sum, { rows, cols }) => sum + rows * cols, 0);
    const each = Math.max(1, Math.ceil(all / (high * across) / (WG * wanted)));
    const magnitudes: number[] = [];
    const values: number[] = [];
    for (const { rows, cols, slot, x: from, y: to } of matrices) {
      const size = rows * cols;
      const count = entries || Math.max(1, Math.min(partials, Math.ceil(size / 4 / (WG * 64))));
      const first = given ? slot * given.magnitudes.shape[1]! : magnitudes.length / 8;
      const stretch = Math.ceil(Math.ceil(size / 4) / count);
      for (let i = 0; i < count; i++) {
        const end = Math.min((i + 1) * stretch, Math.ceil(size / 4));
        magnitudes.push(from, 0, 1, size, i * stretch, end, first + i, 0);
      }
      const [high_rows, width] = block === null ? [1, size] : [rows, cols];
      const units = Math.ceil(high_rows / high) * Math.ceil(width / across);
      for (let unit = 0; unit < units; unit += WG * each) {
        values.push(
          from, to, high_rows, width, unit, Math.min(unit + WG * each, units), given ? slot : first, count);
      }
    }
    const table = (records: number[]) => this.#hold(
      device.tensor(Uint32Array.from(records), [records.length]));
    const measures = scaled ? { jobs: table(magnitudes), count: magnitudes.length / 8 } : null;
    const records = { jobs: table(values), count: values.length / 8 };
    const partial = given?.magnitudes ??
      (measures ? this.#hold(device.empty([measures.count], "u32")) : null);
    return {
      measure: measures && partial && (() => {
        launch("quant/largest", {
          entry: "largest", bind: { x, partial, jobs: measures.jobs },
          params: {
            rows: 0, cols: 0, block: 0, units: 0, each: 0, groups: measures.count, first: 0, partials: 0,
            per: 1,
          },
          constants: { WG }, workgroups: [measures.count],
          conditions: [
            "jobs", ...(given ? ["accumulate" as const] : []), ...(wide ? ["vec4" as const] : []),
            ...(halves ? ["halves" as const] : []),
          ],
        });
        return partial;
      }),
      values: (amax) => launch("quant/fake_quantize", {
        bind: {
          x, y, amax: (given ? null : amax) ?? x, jobs: records.jobs, tiles: x, table: x, random: x,
          scales: given?.scales ?? x,
        },
        params: {
          rows: 0, cols: 0, block: block ?? 64, units: 0, each: 0, groups: records.count, first: 0,
          partials: 0, stream: 0, per: 1, apart: 0, whole: 0, placed: 0,
        },
        constants: { WG }, workgroups: [records.count],
        conditions: [
          "jobs", ...conditions, ...shapeConditions(block, blocks), ...(wide ? ["vec4" as const] : []),
          ...(given ? ["given" as const] : []), ...(halves ? ["halves" as const] : []),
          ...(options.scale_rule === "floor" ? ["floor_scale" as const] : []),
          ...(options.whole_scale ? ["whole_scale" as const] : []),
        ],
      }),
    };
  }

  /** What holds all of these tensors of one buffer. */
  #whole(device: Device, tensors: readonly Tensor[]): Tensor {
    const begin = Math.min(...tensors.map(({ byteOffset }) => byteOffset));
    const end = Math.max(...tensors.map(({ byteOffset, byteLength }) => byteOffset + byteLength));
    const { storage, dtype } = tensors[0]!;
    device.pool.retain(storage);
    const each = dtype === "f32" ? 4 : 8;
    return this.#hold(new Tensor(device, storage, begin, [Math.ceil((end - begin) / 16) * each], dtype));
  }

  #hold(tensor: Tensor): Tensor {
    this.#held.push(tensor);
    return tensor;
  }
}

/**
 * Scales for the next update from the largest magnitudes of the last ones, in place: history[slot, position %
 * length] = the largest of magnitudes[slot], or 0 where that is not finite; scale = max(history) / top, or as
 * it was where that is 0; magnitudes = 0.
 *
 * @param magnitudes  u32 [slots, entries], bits of f32
 * @param history     f32 [slots, length]
 * @param scales      f32 [slots]
 * @param tops        f32 [slots], the largest values of the formats
 * @param counter     u32 [4]; its last is the position
 */
export const update_scales = defineOp({
  name: "update_scales",
  mutates: [0, 1, 2],
  forward(_ctx, magnitudes: Tensor, history: Tensor, scales: Tensor, tops: Tensor, counter: Tensor): Tensor[
    ] {
    const [slots, length] = history.shape as [number, number];
    check(magnitudes.shape.length === 2 && magnitudes.shape[0] === slots, "update_scales", "magnitudes",
      `[${slots}, entries]`, magnitudes);
    for (const [what, tensor] of [["scales", scales], ["tops", tops]] as const) {
      check(tensor.size === slots, "update_scales", what, `[${slots}]`, tensor);
    }
    check(counter.size === 4, "update_scales", "counter", "[4]", counter);
    const WG = scales.device.info.isSoftware ? 8 : 64;
    launch("quant/update_scales", {
      bind: { magnitudes, history, scales, tops, counter },
      params: { slots, length, entries: magnitudes.shape[1]! }, constants: { WG }, workgroups: [slots],
    });
    return [];
  },
});

function shapeConditions(block: number | null, blocks: BlockShape): Condition[] {
  if (block === null || blocks === "rows") return [];
  return blocks === "columns" ? ["columns"] : ["square"];
}
