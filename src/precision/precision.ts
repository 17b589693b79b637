/** The roundings of a training run: of its weights, once per update, and of what its products read. */
import { ALONE, everyRank, type Group, largestInGroup } from "../ops/collectives.ts";
import {
  FakeBatch, type FakeJob, FAKE_LAYOUTS, type FakeQuantizeOptions, type Place, spreadOf, update_scales,
} from "../ops/fake_quantize.ts";
import type { Device } from "../tensor/device.ts";
import { ELEMENTS } from "../tensor/formats.ts";
import { seedWords } from "../tensor/philox.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import { localsOf, perRank, shardedOf } from "../tensor/sharded.ts";
import { captureOn, type StepGraph } from "../tensor/step_graph.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { together } from "../tensor/together.ts";
import type { ActiveRounding, Roundings } from "./active.ts";
import {
  commonEntries, isScaledAsWhole, ProjectionRounding, SharedTensors, STREAMS_EACH,
} from "./projection.ts";
import type { Operand, Products } from "./recipes.ts";

/** Random streams of roundings begin here; parameters and data take those below. */
const STREAMS = 0x4000_0000;

/** A weight of linear layers on the ranks of its stage, and how its products are rounded. */
export interface RoundedProjection {
  readonly weight: Tensor;
  readonly products: Products;
  /** Its number among the projections of the model. */
  readonly number: number;
  /** Ranks that have parts of one input, and of one gradient. */
  readonly tensor: Group;
  /** Ranks that have parts of one matrix, or the same one. */
  readonly matrix: Group;
  /** Whether ranks that are in no such group have other matrices. */
  readonly divided: boolean;
  /** Of every rank. */
  readonly ranks: readonly RankPlace[];
  /** Its entries among the scales of the model: of its first matrix on every rank, and of its input. */
  readonly scales: { readonly weights: readonly number[]; readonly input: number };
}

/** What is a rank's own. */
export interface RankPlace {
  /** The number of its micro-batch among those of one pass. */
  readonly micro: number;
  /** See `Drawing`; tables of `along` and `down` belong to whoever made them. */
  readonly apart: number;
  readonly along: Place | null;
  readonly down: Place | null;
}

/** A projection on one rank. */
export function onOneRank(
  weight: Tensor, products: Products, number: number, entry: number,
): RoundedProjection {
  return {
    weight, products, number, tensor: ALONE, matrix: ALONE, divided: false,
    ranks: [{ micro: 0, apart: 0, along: null, down: null }],
    scales: { weights: [entry], input: entry + matricesOf(weight) },
  };
}

export interface PrecisionOptions {
  readonly seed: number;
  /** Updates that FP8 scales look back on; null: scales follow from the tensor itself. */
  readonly history: number | null;
  /** Micro-batches whose passes are recorded together; default 1. */
  readonly slots?: number;
}

/** Scales of a run as files hold them: of the whole model, whatever ranks it is on. */
export interface SavedScales {
  readonly name: "amax_history" | "scales";
  readonly shape: readonly number[];
  read(): Promise<Float32Array>;
  write(values: Float32Array): void;
}

export class Precision implements Roundings {
  readonly #devices: readonly Device[];
  readonly #counters: Counters;
  readonly #stages: readonly StagePrecision[];
  readonly #roundings = new Map<number, ActiveRounding>();
  readonly #history: number | null;
  #graph: StepGraph | null = null;
  #learning = true;

  /** @param stages the projections of every pipeline stage */
  constructor(
    stages: readonly (readonly RoundedProjection[])[], { seed, history, slots = 1 }: PrecisionOptions,
  ) {
    this.#devices = [...new Set(stages.flat().flatMap(({ weight }) =>
      localsOf(weight).map(({ device }) => device)))];
    this.#history = history;
    [this.#counters, this.#stages] = unscoped(() => {
      const counters = new Counters(seed, slots);
      return [counters, stages.map((projections) => new StagePrecision(
        projections, history, counters, () => this.#learning, this.#roundings))];
    });
  }

  /** Bytes of the rounded weights. */
  get bytes(): number {
    return this.#stages.reduce((sum, { bytes }) => sum + bytes, 0);
  }

  of(key: number): ActiveRounding | null {
    return this.#roundings.get(key) ?? null;
  }

  /** Rounds all weights as they are now. Ready to be called at any time between replays. */
  roundWeights(): void {
    this.#graph ??= unscoped(() => captureOn(this.#devices, () => scope(() => {
      for (const stage of this.#stages) stage.roundWeights();
    })));
    this.#graph.replay();
  }

  /**
   * Sets the numbers that random bits and histories are drawn by.
   * @param micro_batch number in the whole run of the first data-parallel rank's
   * @param slot        which of the micro-batches that are recorded together
   */
  prepare(update: number, micro_batch: number, slot = 0): void {
    this.#counters.write(update, micro_batch, slot);
  }

  /** What is recorded from here on belongs to this one of the micro-batches that are recorded together. */
  enter(slot: number): void {
    this.#counters.slot = slot;
  }

  /** Runs `body` without taking what it sees into account for later scales. */
  watching<T>(body: () => T): T {
    this.#learning = false;
    this.enter(0);
    try {
      return body();
    } finally {
      this.#learning = true;
    }
  }

  /** Records what an update changes: scales that follow from the magnitudes seen since the last one. */
  update(stage: number): void {
    this.#stages[stage]!.update();
  }

  /** What a checkpoint must hold. */
  get state(): readonly SavedScales[] {
    if (this.#history === null) return [];
    const stored = this.#stages.flatMap(({ stored }) => stored);
    const entries = 1 + Math.max(...stored.flatMap(({ slots }) => slots.flat()));
    const of = (name: SavedScales["name"], width: number, shape: readonly number[]): SavedScales => ({
      name, shape,
      async read() {
        const whole = new Float32Array(entries * width);
        for (const { slots, [name]: tensor } of stored) {
          for (const [rank, local] of localsOf(tensor).entries()) {
            const values = await local.read() as Float32Array;
            slots[rank]!.forEach((entry, slot) =>
              whole.set(values.subarray(slot * width, (slot + 1) * width), entry * width));
          }
        }
        return whole;
      },
      write(values) {
        for (const { slots, [name]: tensor } of stored) {
          localsOf(tensor).forEach((local, rank) => local.write(Float32Array.from(
            slots[rank]!.flatMap((entry) => [...values.subarray(entry * width, (entry + 1) * width)]))));
        }
      },
    });
    return [of("amax_history", this.#history, [entries, this.#history]), of("scales", 1, [entries])];
  }

  dispose(): void {
    this.#graph?.dispose();
    for (const stage of this.#stages) stage.dispose();
    this.#counters.dispose();
  }
}

/** u32 [4] each: seed low, seed high, number of the micro-batch, number of the update. */
class Counters {
  slot = 0;
  readonly #seed: readonly [number, number];
  readonly #slots: number;
  readonly #all: {
    readonly device: Device; readonly micro: number; readonly slots: readonly Tensor[];
  }[] = [];

  constructor(seed: number, slots: number) {
    this.#seed = seedWords(seed);
    this.#slots = slots;
  }

  /** That of the slot which is recorded, for micro-batch number `micro` of a pass. */
  of(device: Device, micro: number): () => Tensor {
    let found = this.#all.find((one) => one.device === device && one.micro === micro);
    if (!found) {
      const slots = Array.from({ length: this.#slots }, () => device.zeros([4], "u32"));
      this.#all.push(found = { device, micro, slots });
    }
    const { slots } = found;
    return () => slots[this.slot]!;
  }

  write(update: number, first: number, slot: number): void {
    for (const { micro, slots } of this.#all) {
      slots[slot]!.write(Uint32Array.from([...this.#seed, first + micro, update]));
    }
  }

  dispose(): void {
    for (const { slots } of this.#all) for (const counter of slots) counter.dispose();
  }
}

/** Scales from earlier updates. */
interface Delayed {
  readonly magnitudes: Tensor;
  readonly amax_history: Tensor;
  readonly scales: Tensor;
  readonly tops: Tensor;
  /** Ranks whose magnitudes count together. */
  readonly group: Group;
  /** Of every rank the entries in the scales of the model. */
  readonly slots: number[][];
}

/** Weights that are rounded alike: for the product (place 0) or for the gradient of its input (1). */
interface Family {
  readonly options: FakeQuantizeOptions;
  readonly matrix: Group;
  readonly delayed: Delayed | null;
  readonly members: {
    readonly weight: Tensor; readonly place: 0 | 1; readonly slot: number;
    readonly roundings: readonly ProjectionRounding[];
  }[];
}

/** The projections of one pipeline stage. */
class StagePrecision {
  readonly #delayed: readonly Delayed[];
  readonly #counter: Tensor | null;
  readonly #families: { readonly batches: readonly FakeBatch[]; readonly family: Family }[];
  readonly #values: Tensor[] = [];
  readonly #shared: SharedTensors[] = [];

  constructor(
    projections: readonly RoundedProjection[], history: number | null, counters: Counters,
    learns: () => boolean, roundings: Map<number, ActiveRounding>,
  ) {
    const [any] = projections;
    const devices = any ? localsOf(any.weight).map(({ device }) => device) : [];
    // Scales of matrices that not all ranks have are apart from the others'.
    const lists = [projections, projections.filter(({ divided }) => divided)] as const;
    const isIn = (list: 0 | 1, { divided }: RoundedProjection) => (divided ? 1 : 0) === list;
    const delayed = history === null || !any ? [] : ([0, 1] as const).flatMap((list) => {
      if (lists[list].length === 0) return [];
      return [makeDelayed(lists[list].map((one) => ({
        one, weights: isIn(list, one), tensors: list === 0,
      })), devices, history)];
    });
    this.#delayed = delayed;
    this.#counter = delayed.length > 0
      ? shardedOf(devices.map((device) => counters.of(device, any!.ranks[0]!.micro)())) : null;
    const families = new Map<string, Family>();
    const next = [0, 0] as [number, number];
    for (const one of projections) {
      const { weight, products, number, ranks, matrix, divided, tensor } = one;
      const list = divided ? 1 : 0;
      const weightSlot = next[list];
      next[list] += matricesOf(weight);
      const slot = next[0];
      next[0] += 2;
      const own = localsOf(weight).map(({ device }, rank) => {
        const { micro, apart, along, down } = ranks[rank]!;
        const given = delayed[0] && {
          magnitudes: localsOf(delayed[0].magnitudes)[rank]!, scales: localsOf(delayed[0].scales)[rank]!,
        };
        return new ProjectionRounding(products, {
          stream: STREAMS + STREAMS_EACH * number, slot, learns, given: given ?? null,
          drawing: { counter: counters.of(device, micro), apart, along, down },
        });
      });
      const isShared = history === null && isScaledAsWhole(products) && !isSolo(tensor);
      const shared = isShared ? new SharedTensors(own, weight, tensor) : null;
      if (shared) this.#shared.push(shared);
      roundings.set(weight.key, { rounding: perRank(own), shared });
      const { fprop, dgrad } = products;
      const forward = weightOptions(fprop.weight, "rows");
      const backward = weightOptions(dgrad.weight, "columns");
      const add = (options: FakeQuantizeOptions, place: 0 | 1) => {
        const key = JSON.stringify([options, matrix.members, divided]);
        const family = families.get(key) ??
          { options, matrix, delayed: delayed[list] ?? null, members: [] };
        families.set(key, family);
        family.members.push({ weight, place, slot: weightSlot, roundings: own });
      };
      add(forward, 0);
      if (JSON.stringify(forward) !== JSON.stringify(backward)) add(backward, 1);
    }
    this.#families = [...families.values()].map((family) => ({ family, batches: this.#batches(family) }));
  }

  get bytes(): number {
    return this.#values.reduce((sum, { byteLength }) => sum + byteLength, 0);
  }

  get stored(): readonly Pick<Delayed, "amax_history" | "scales" | "slots">[] {
    return this.#delayed;
  }

  roundWeights(): void {
    for (const { batches, family: { matrix, delayed } } of this.#families) {
      const measured = batches.map((batch) => batch.measure());
      const own = delayed || isSolo(matrix) ? measured : agreed(measured, matrix);
      batches.forEach((batch, rank) => batch.values(own[rank]!));
    }
  }

  update(): void {
    for (const { magnitudes, amax_history, scales, tops, group } of this.#delayed) {
      const most = largestInGroup(magnitudes, group);
      if (most !== magnitudes) magnitudes.copyFrom(most);
      update_scales(magnitudes, amax_history, scales, tops, this.#counter!);
    }
  }

  dispose(): void {
    for (const { batches } of this.#families) for (const batch of batches) batch.dispose();
    for (const shared of this.#shared) shared.dispose();
    for (const tensor of this.#values) tensor.dispose();
    if (this.#counter && localsOf(this.#counter)[0] !== this.#counter) this.#counter.dispose();
    for (const { magnitudes, amax_history, scales, tops } of this.#delayed) {
      for (const tensor of [magnitudes, amax_history, scales, tops]) tensor.dispose();
    }
  }

  /** Of every rank one. */
  #batches({ options, members, delayed }: Family): FakeBatch[] {
    const devices = localsOf(members[0]!.weight).map(({ device }) => device);
    const entries = commonEntries(devices);
    return devices.map((device, rank) => {
      const weights = members.map(({ weight }) => localsOf(weight)[rank]!);
      const values = together(device, weights.map(({ shape }) => shape));
      this.#values.push(...values);
      members.forEach(({ roundings, place }, i) => roundings[rank]!.take(values[i]!, place));
      const jobs = members.map(({ slot }, i): FakeJob => ({ x: weights[i]!, y: values[i]!, slot }));
      const given = delayed && {
        scales: localsOf(delayed.scales)[rank]!, magnitudes: localsOf(delayed.magnitudes)[rank]!,
      };
      return new FakeBatch(device, jobs, options, given, entries);
    });
  }
}

const isSolo = ({ members }: Group): boolean => members.every(({ length }) => length === 1);

/** Magnitudes of every rank's launches, the largest of their group. */
function agreed(measured: readonly (readonly Tensor[])[], group: Group): Tensor[][] {
  const launches = measured[0]!.map((_, i) =>
    localsOf(largestInGroup(shardedOf(measured.map((own) => own[i]!)), group)));
  return measured.map((_, rank) => launches.map((own) => own[rank]!));
}

function weightOptions(operand: Operand, sum: "rows" | "columns"): FakeQuantizeOptions {
  const whole = FAKE_LAYOUTS[operand.format].block === null;
  return {
    format: operand.format, blocks: whole ? "rows" : operand.blocks === "tiles" ? "tiles" : sum,
    scale_rule: operand.scale_rule, whole_scale: operand.whole_scale,
  };
}

/** Matrices of a weight [N, K] or a stack [E, N, K]. */
function matricesOf({ shape }: Tensor): number {
  return shape.length > 2 ? shape[0]! : 1;
}

function makeDelayed(
  planned: readonly { one: RoundedProjection; weights: boolean; tensors: boolean }[],
  devices: readonly Device[], length: number,
): Delayed {
  const top = ({ format }: Operand) => ELEMENTS[format === "fp8_e5m2" ? "e5m2" : "e4m3fn"].max;
  const tops = planned.flatMap(({ one: { weight, products: { fprop, dgrad } }, weights, tensors }) => [
    ...Array<number>(weights ? matricesOf(weight) : 0).fill(top(fprop.weight)),
    ...tensors ? [top(fprop.x), top(dgrad.dy)] : [],
  ]);
  const slots = devices.map((_, rank) =>
    planned.flatMap(({ one: { weight, scales: { weights: first, input } }, weights, tensors }) => [
      ...Array.from({ length: weights ? matricesOf(weight) : 0 }, (_matrix, i) => first[rank]! + i),
      ...tensors ? [input, input + 1] : [],
    ]));
  const entries = commonEntries(devices) || spreadOf(devices[0]!).partials;
  const on = (make: (device: Device) => Tensor) => scope(() => shardedOf(devices.map(make)));
  const values = (numbers: readonly number[]) => on((device) => device.tensor([...numbers], [tops.length]));
  const [{ one: { matrix } }] = planned as [typeof planned[number]];
  const tensors = planned.some((of) => of.tensors);
  const magnitudes = on((device) => device.zeros([tops.length, entries], "u32"));
  return {
    magnitudes, amax_history: on((device) => device.zeros([tops.length, length])),
    scales: values(tops.map(() => 1)), tops: values(tops),
    group: tensors ? everyRank(magnitudes) : matrix, slots,
  };
}
