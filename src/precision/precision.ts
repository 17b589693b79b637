/** The roundings of a training run: of its weights, once per update, and of what its products read. */
import type { Graph } from "../gpu/stream.ts";
import {
  FakeBatch, type FakeJob, FAKE_LAYOUTS, type FakeQuantizeOptions, fakeValues, largestMagnitude,
    type Magnitudes,
  padded_offsets, rotateColumns, type RowGroups, spreadOf, update_scales,
} from "../ops/fake_quantize.ts";
import type { Rounding, Summand } from "../ops/rounding.ts";
import type { Device } from "../tensor/device.ts";
import { ELEMENTS } from "../tensor/formats.ts";
import { seedWords } from "../tensor/philox.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { together } from "../tensor/together.ts";
import type { Roundings } from "./active.ts";
import type { Operand, Products } from "./recipes.ts";

/** Random streams of roundings begin here; parameters and data take those below. */
const STREAMS = 0x4000_0000;
/** Of a projection: its numbers of random streams. */
const [ALONG, DOWN, EACH] = [0, 1, 2] as const;

/** Scales from earlier updates: one slot per matrix of a weight, per input and per gradient. */
interface Delayed {
  readonly magnitudes: Tensor;
  readonly history: Tensor;
  readonly scales: Tensor;
  readonly tops: Tensor;
}

export class Precision implements Roundings {
  /** u32 [4]: seed low, seed high, number of the micro-batch, number of the update. */
  readonly #counter: Tensor;
  readonly #seed: readonly [number, number];
  readonly #device: Device;
  readonly #roundings = new Map<number, ProjectionRounding>();
  readonly #batches: FakeBatch[] = [];
  readonly #values: Tensor[] = [];
  readonly #delayed: Delayed | null;
  #graph: Graph | null = null;
  #learning = true;

  /**
   * @param plan     formats by parameter name
   * @param weights  parameters by name
   * @param history  updates that FP8 scales look back on; null: scales follow from the tensor itself
   */
  constructor(
    device: Device, plan: ReadonlyMap<string, Products>, weights: ReadonlyMap<string, Tensor>,
    { seed, history }: { readonly seed: number; readonly history: number | null },
  ) {
    this.#device = device;
    this.#seed = seedWords(seed);
    const planned = [...plan].map(([name, products]) => ({ weight: weights.get(name)!, products }));
    const made = unscoped(() => ({
      counter: device.zeros([4], "u32"),
      delayed: history === null ? null : makeDelayed(device, planned, history),
    }));
    this.#counter = made.counter;
    this.#delayed = made.delayed;
    let slot = 0;
    const wanted: Wanted[] = [];
    planned.forEach(({ weight, products }, i) => {
      const first = slot;
      slot += matricesOf(weight) + 2;
      const { fprop, dgrad } = products;
      const forward = weightOptions(fprop.weight, "rows");
      const backward = weightOptions(dgrad.weight, "columns");
      wanted.push({ weight, options: forward, slot: first, place: 0 });
      const isOne = JSON.stringify(forward) === JSON.stringify(backward);
      if (!isOne) wanted.push({ weight, options: backward, slot: first, place: 1 });
      this.#roundings.set(weight.key, new ProjectionRounding(products, {
        counter: this.#counter, stream: STREAMS + EACH * i, delayed: this.#delayed, slot: slot - 2,
        learns: () => this.#learning,
      }));
    });
    this.#prepareWeights(wanted);
  }

  /** Bytes of the rounded weights. */
  get bytes(): number {
    return this.#values.reduce((sum, { byteLength }) => sum + byteLength, 0);
  }

  of(key: number): Rounding | null {
    return this.#roundings.get(key) ?? null;
  }

  /** Rounds all weights as they are now. Ready to be called at any time between replays. */
  roundWeights(): void {
    if (this.#batches.length === 0) return;
    this.#graph ??= unscoped(() => this.#device.capture(() => scope(() => {
      for (const batch of this.#batches) batch.record();
    })).graph);
    this.#device.replay(this.#graph);
  }

  /** Sets the numbers that random bits and histories are drawn by. */
  prepare(update: number, micro_batch: number): void {
    this.#counter.write(Uint32Array.from([...this.#seed, micro_batch, update]));
  }

  /** Runs `body` without taking what it sees into account for later scales. */
  watching<T>(body: () => T): T {
    this.#learning = false;
    try {
      return body();
    } finally {
      this.#learning = true;
    }
  }

  /** Records what an update changes: scales that follow from the magnitudes seen since the last one. */
  update(): void {
    if (!this.#delayed) return;
    const { magnitudes, history, scales, tops } = this.#delayed;
    update_scales(magnitudes, history, scales, tops, this.#counter);
  }

  /** What a checkpoint must hold, by name. */
  get state(): ReadonlyMap<string, Tensor> {
    const { history, scales } = this.#delayed ?? {};
    return new Map(history && scales ? [["amax_history", history], ["scales", scales]] : []);
  }

  dispose(): void {
    if (this.#graph) this.#device.stream.disposeGraph(this.#graph);
    for (const batch of this.#batches) batch.dispose();
    for (const tensor of [this.#counter, ...this.#values, ...Object.values(
      this.#delayed ?? {})]) tensor.dispose();
  }

  #prepareWeights(wanted: readonly Wanted[]): void {
    const groups = new Map<string, Wanted[]>();
    for (const one of wanted) {
      const key = JSON.stringify(one.options);
      groups.set(key, [...(groups.get(key) ?? []), one]);
    }
    for (const group of groups.values()) {
      const values = unscoped(() => together(this.#device, group.map(({ weight }) => weight.shape)));
      this.#values.push(...values);
      const jobs = group.map(({ weight, slot }, i): FakeJob => ({ x: weight, y: values[i]!, slot }));
      this.#batches.push(new FakeBatch(this.#device, jobs, group[0]!.options, this.#delayed));
      group.forEach(({ weight, place }, i) => this.#roundings.get(weight.key)!.take(values[i]!, place));
    }
  }
}

/** A weight to be rounded: for the product (place 0) or for the gradient of its input (1). */
interface Wanted {
  readonly weight: Tensor;
  readonly options: FakeQuantizeOptions;
  readonly slot: number;
  readonly place: 0 | 1;
}

interface Source {
  readonly counter: Tensor;
  readonly stream: number;
  readonly delayed: Delayed | null;
  /** Of the input; the gradient has the next. */
  readonly slot: number;
  readonly learns: () => boolean;
}

class ProjectionRounding implements Rounding {
  readonly #products: Products;
  readonly #source: Source;
  readonly #weights: Tensor[] = [];

  constructor(products: Products, source: Source) {
    this.#products = products;
    this.#source = source;
  }

  take(values: Tensor, place: 0 | 1): void {
    this.#weights[place] = values;
  }

  forward(): Tensor {
    return this.#weights[0]!;
  }

  backward(): Tensor {
    return this.#weights[1] ?? this.#weights[0]!;
  }

  input(
    x: Tensor, keeps: boolean, groups: RowGroups | null,
  ): { forward: Tensor; kept: Summand | null } {
    const { fprop, wgrad } = this.#products;
    const { along, down } = this.#round(x, fprop.x, keeps ? wgrad.x : null, groups, this.#source.slot);
    return { forward: along!, kept: down };
  }

  gradient(
    dy: Tensor, wants: { readonly x: boolean; readonly weight: boolean }, groups: RowGroups | null,
  ): { backward: Tensor | null; kept: Summand | null } {
    const { dgrad, wgrad } = this.#products;
    const { along, down } = this.#round(
      dy, wants.x ? dgrad.dy : null, wants.weight ? wgrad.dy : null, groups, this.#source.slot + 1);
    return { backward: along, kept: down };
  }

  /** Rows of x with blocks along them and with blocks down the columns, as far as they are wanted. */
  #round(
    x: Tensor, along: Operand | null, down: Operand | null, groups: RowGroups | null, slot: number,
  ): { along: Tensor | null; down: Summand | null } {
    const { delayed, learns } = this.#source;
    const needsMagnitudes = [along, down].some((operand) => operand && FAKE_LAYOUTS[operand.format].scaled);
    let given: FakeQuantizeOptions["given"];
    let magnitudes: Magnitudes | null = null;
    let turned: { rotated: Tensor; own: Magnitudes } | null = null;
    if (delayed) {
      const { partials } = spreadOf(x.device);
      if (learns()) largestMagnitude(x, { partial: delayed.magnitudes, first: slot * partials });
      given = { scales: delayed.scales, slot };
    } else if (down?.hadamard) {
      const both = rotateColumns(x, groups);
      turned = both;
      magnitudes = both.plain;
    } else if (needsMagnitudes) {
      magnitudes = largestMagnitude(x);
    }
    const options = (operand: Operand, blocks: "rows" | "columns", stream: number): FakeQuantizeOptions => ({
      format: operand.format, blocks, scale_rule: operand.scale_rule, whole_scale: operand.whole_scale, given,
      random: operand.stochastic ? { counter: this.#source.counter, stream: this.#source.stream + stream }
        : undefined,
    });
    const first = along && fakeValues(x, options(along, "rows", ALONG), magnitudes);
    if (!down) return { along: first, down: null };
    const whole = FAKE_LAYOUTS[down.format].block === null;
    if (first && whole && JSON.stringify(along) === JSON.stringify(down)) {
      return { along: first, down: { tensor: first, offsets: null } };
    }
    const how = options(down, "columns", DOWN);
    const tensor = turned
      ? fakeValues(turned.rotated, how, turned.own)
      : fakeValues(x, { ...how, groups: whole ? null : groups }, magnitudes);
    const block = FAKE_LAYOUTS[down.format].block ?? 1;
    const offsets = groups && !whole ? padded_offsets(groups.offsets, block) : null;
    return { along: first, down: { tensor, offsets } };
  }
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
  device: Device, planned: readonly { weight: Tensor; products: Products }[], length: number,
): Delayed {
  const top = ({ format }: Operand) => ELEMENTS[format === "fp8_e5m2" ? "e5m2" : "e4m3fn"].max;
  const tops = planned.flatMap(({ weight, products: { fprop, dgrad } }) => [
    ...Array.from({ length: matricesOf(weight) }, () => top(fprop.weight)), top(fprop.x), top(dgrad.dy),
  ]);
  return {
    magnitudes: device.zeros([tops.length, spreadOf(device).partials], "u32"),
    history: device.zeros([tops.length, length]),
    scales: device.tensor(tops.map(() => 1), [tops.length]), tops: device.tensor(tops, [tops.length]),
  };
}
