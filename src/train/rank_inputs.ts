/** What the ranks of a model read of a micro-batch, and what their losses count for. */
import type { TrainingBatch } from "../models/nemotron_h.ts";
import { zigzag } from "../nn/context_parallel.ts";
import { coordinatesOf, ranksPerStage } from "../parallel/mesh.ts";
import type { MeshModel } from "../parallel/model.ts";
import type { Device } from "../tensor/device.ts";
import { seedWords } from "../tensor/philox.ts";
import { scope } from "../tensor/scope.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor, TensorDType } from "../tensor/tensor.ts";
import { type Batch, IGNORED, mtpInputs, mtpLabels } from "./packing.ts";

/** The inputs of a pipeline stage. */
export interface StageInputs extends TrainingBatch {
  readonly seq_idx: Tensor;
  readonly counter: Tensor;
  /** u32 [tokens]: numbers of a rank's tokens, for random numbers; null: 0, 1, 2 ... */
  readonly rows: Tensor | null;
  /**
   * f32 [3 + depths]: what this rank's values count for in those of the step: the loss, the balancing loss,
   * nothing, the losses of the prediction depths. What several ranks have alike counts on one of them.
   */
  readonly shares: Tensor;
  /** d objective / d loss of this rank: of the next token, of every prediction depth, of the routers. */
  readonly seeds: { readonly main: Tensor; readonly mtp: readonly Tensor[]; readonly aux: Tensor };
}

export interface InputSizes {
  readonly batch: number;
  readonly seqlen: number;
  readonly mtp_depths: number;
  /** Whether random numbers are drawn in front of routers. */
  readonly random: boolean;
}

/** By what the losses of a step are divided. */
export interface Divisor {
  /** Micro-batches of the step, those of all data-parallel ranks. */
  readonly micros: number;
  /** Weight of the mean over prediction depths. */
  readonly mtp_scale: number;
  /**
   * Scored positions of all micro-batches for the next token and for every depth: each position counts
   * alike. Null: each micro-batch counts alike, as long as it has scored positions.
   */
  readonly scored: readonly number[] | null;
}

/** What random numbers of a micro-batch are drawn by. */
export interface Numbering {
  readonly seed: number;
  /** Number in the whole run of the micro-batch of the first data-parallel rank. */
  readonly first: number;
}

/** Tensors that ranks with the same tokens on one device share. */
interface Tokens {
  readonly dp: number;
  readonly cp: number;
  readonly input_ids: Tensor;
  readonly targets: Tensor;
  readonly seq_idx: Tensor;
  readonly counter: Tensor;
  readonly mtp: readonly { readonly input_ids: Tensor; readonly targets: Tensor }[];
}

/** A rank's shares and seeds: views of one buffer, so that a micro-batch needs one upload of them. */
interface Weighing {
  readonly dp: number;
  readonly cp: number;
  /** Whether the rank's losses count, which all ranks of tp have alike. */
  readonly counts: boolean;
  /** Whether its balancing losses do, which all ranks with tokens of the micro-batch have alike. */
  readonly countsAux: boolean;
  readonly whole: Tensor;
  written: string;
}

/** For evaluation, which draws nothing. */
const NUMBERED: Numbering = { seed: 0, first: 0 };
/** Every view of a buffer begins at a multiple of so many f32. */
const UNIT = 64;

/** Inputs of one micro-batch of every data-parallel rank, overwritten before every replay. */
export class RankInputs {
  readonly stages: readonly StageInputs[];
  readonly #sizes: InputSizes;
  readonly #cp: number;
  readonly #tokens: Tokens[] = [];
  readonly #weighings: Weighing[] = [];
  readonly #owned: Tensor[] = [];

  constructor(mesh: MeshModel, sizes: InputSizes) {
    this.#sizes = sizes;
    this.#cp = mesh.layout.cp;
    const perStage = ranksPerStage(mesh.layout);
    const { cp: parts, tp: cuts, sp } = mesh.layout;
    const isCut = sizes.random && (parts > 1 || sp);
    this.stages = mesh.stages.map(({ model }) => {
      const [any] = model.parameters.values();
      const ranks = localsOf(any!).map(({ device }, rank) => {
        const { tp, cp, dp } = coordinatesOf({ ...mesh.layout, pp: 1 }, rank % perStage);
        return {
          tokens: this.#tokensOf(device, dp, cp), weighing: this.#weighingOf(device, dp, cp, tp === 0),
          rows: () => numbersOf(device, sizes, [cp, parts], sp ? [tp, cuts] : [0, 1]),
        };
      });
      const on = (of: (rank: (typeof ranks)[number]) => Tensor) => {
        const tensor = scope(() => shardedOf(ranks.map(of)));
        return this.#owned.includes(tensor) ? tensor : this.#keep(tensor);
      };
      const view = (at: number, shape: readonly number[]) =>
        on(({ weighing }) => weighing.whole.range(at * UNIT, shape));
      return {
        input_ids: on(({ tokens }) => tokens.input_ids), targets: on(({ tokens }) => tokens.targets),
        seq_idx: on(({ tokens }) => tokens.seq_idx), counter: on(({ tokens }) => tokens.counter),
        rows: isCut ? this.#keep(shardedOf(ranks.map(({ rows }) => this.#keep(rows())))) : null,
        mtp: Array.from({ length: sizes.mtp_depths }, (_, i) => ({
          input_ids: on(({ tokens }) => tokens.mtp[i]!.input_ids),
          targets: on(({ tokens }) => tokens.mtp[i]!.targets),
        })),
        shares: view(0, [3 + sizes.mtp_depths]),
        seeds: {
          main: view(1, []), aux: view(2, []),
          mtp: Array.from({ length: sizes.mtp_depths }, (_, i) => view(3 + i, [])),
        },
      };
    });
  }

  /**
   * Uploads a micro-batch.
   * @param batches that of every data-parallel rank, in order; null: nothing of its counts
   */
  write(batches: readonly (Batch | null)[], divisor: Divisor, { seed, first }: Numbering = NUMBERED): void {
    const { mtp_depths } = this.#sizes;
    const cut = batches.map((batch) => batch && new CutBatch(batch, this.#cp, mtp_depths));
    for (const { dp, cp, input_ids, targets, seq_idx, counter, mtp } of this.#tokens) {
      const batch = cut[dp];
      if (!batch) continue;
      input_ids.write(batch.part(batch.input_ids, cp));
      targets.write(batch.part(batch.labels[0]!, cp));
      seq_idx.write(batch.part(batch.seq_idx, cp));
      if (this.#sizes.random) counter.write(Uint32Array.from([...seedWords(seed), first + dp, 0]));
      mtp.forEach((depth, i) => {
        depth.input_ids.write(batch.part(batch.mtpInputs[i]!, cp));
        depth.targets.write(batch.part(batch.labels[i + 1]!, cp));
      });
    }
    for (const weighing of this.#weighings) {
      const values = weigh(weighing, cut[weighing.dp] ?? null, divisor, mtp_depths);
      const text = values.join();
      if (text === weighing.written) continue; // of full rows all micro-batches count alike
      weighing.whole.write(values);
      weighing.written = text;
    }
  }

  dispose(): void {
    for (const tensor of this.#owned) tensor.dispose();
  }

  #keep(tensor: Tensor): Tensor {
    this.#owned.push(tensor);
    return tensor;
  }

  #tokensOf(device: Device, dp: number, cp: number): Tokens {
    const found = this.#tokens.find(
      (tokens) => tokens.dp === dp && tokens.cp === cp && tokens.input_ids.device === device);
    if (found) return found;
    const { batch, seqlen, mtp_depths } = this.#sizes;
    const zeros = (type: TensorDType) => this.#keep(device.zeros([batch, seqlen / this.#cp], type));
    const ids = () => zeros("i32");
    const tokens: Tokens = {
      dp, cp, input_ids: ids(), targets: ids(), seq_idx: ids(), counter: this.#keep(device.zeros([4], "u32")),
      mtp: Array.from({ length: mtp_depths }, () => ({ input_ids: ids(), targets: ids() })),
    };
    this.#tokens.push(tokens);
    return tokens;
  }

  #weighingOf(device: Device, dp: number, cp: number, counts: boolean): Weighing {
    const found = this.#weighings.find((one) =>
      one.dp === dp && one.cp === cp && one.counts === counts && one.whole.device === device);
    if (found) return found;
    const whole = this.#keep(device.zeros([(3 + this.#sizes.mtp_depths) * UNIT]));
    const weighing = { dp, cp, counts, countsAux: counts && cp === 0, whole, written: "" };
    this.#weighings.push(weighing);
    return weighing;
  }
}

/**
 * Where a rank's tokens stand in the rows of a micro-batch, one row after the other: u32.
 * @param among the parts of a row under context parallelism, and of these under sequence parallelism
 */
function numbersOf(
  device: Device, { batch, seqlen }: InputSizes, [cp, parts]: readonly [number, number],
  [tp, cuts]: readonly [number, number],
): Tensor {
  const length = seqlen / parts / cuts;
  const own = zigzag(parts, seqlen)[cp]!.slice(tp * length, (tp + 1) * length);
  const numbers = Array.from({ length: batch }, (_, row) => own.map((position) => row * seqlen + position));
  return device.tensor(Uint32Array.from(numbers.flat()), [batch * length], "u32");
}

/** A micro-batch of one data-parallel rank, whose positions the ranks of cp share. */
class CutBatch {
  readonly input_ids: Int32Array;
  readonly seq_idx: Int32Array;
  /** Of the next token, and of every prediction depth. They look beyond the cuts. */
  readonly labels: readonly Int32Array[];
  readonly mtpInputs: readonly Int32Array[];
  readonly #seqlen: number;
  readonly #positions: readonly (readonly number[])[];

  constructor(batch: Batch, cp: number, depths: number) {
    const each = Array.from({ length: depths }, (_, i) => i + 1);
    this.input_ids = batch.input_ids;
    this.seq_idx = batch.seq_idx;
    this.labels = [batch.labels, ...each.map((depth) => mtpLabels(batch, depth))];
    this.mtpInputs = each.map((depth) => mtpInputs(batch, depth));
    this.#seqlen = batch.seqlen;
    this.#positions = cp === 1 ? [] : zigzag(cp, batch.seqlen);
  }

  /** The values at the positions of a rank of cp. */
  part(values: Int32Array, cp: number): Int32Array {
    const positions = this.#positions[cp];
    if (!positions) return values;
    const rows = values.length / this.#seqlen;
    return Int32Array.from({ length: rows * positions.length }, (_, i) => values[
      Math.floor(i / positions.length) * this.#seqlen + positions[i % positions.length]!]!);
  }

  /** Scored positions at a depth: all, or those of a rank of cp. */
  scored(depth: number, cp: number | null): number {
    const labels = this.labels[depth]!;
    return countScored(cp === null ? labels : this.part(labels, cp));
  }
}

/** The contents of a rank's `Weighing`. */
function weigh(
  { cp, counts, countsAux }: Weighing, batch: CutBatch | null, divisor: Divisor, depths: number,
): Float32Array {
  const values = new Float32Array((3 + depths) * UNIT);
  if (!batch) return values;
  const share = (depth: number) => {
    const all = batch.scored(depth, null);
    const own = batch.scored(depth, cp);
    if (divisor.scored) return own / Math.max(divisor.scored[depth]!, 1);
    return all === 0 ? 0 : own / all / divisor.micros;
  };
  values[UNIT] = share(0);
  values[2 * UNIT] = 1 / divisor.micros;
  if (counts) values[0] = share(0);
  if (countsAux) values[1] = 1 / divisor.micros;
  for (let depth = 1; depth <= depths; depth++) {
    const one = share(depth);
    values[(2 + depth) * UNIT] = one * divisor.mtp_scale / depths;
    if (counts) values[2 + depth] = one;
  }
  return values;
}

/** Labels that are scored. */
function countScored(labels: Int32Array): number {
  return labels.reduce((n, label) => n + (label === IGNORED ? 0 : 1), 0);
}

/** Batches with scored positions by so many, the last ones with null for what is missing. */
export function* inGroups(batches: Iterable<Batch>, size: number): Generator<(Batch | null)[]> {
  let group: (Batch | null)[] = [];
  for (const batch of batches) {
    if (batch.scored === 0) continue;
    group.push(batch);
    if (group.length < size) continue;
    yield group;
    group = [];
  }
  if (group.length > 0) yield [...group, ...Array<null>(size - group.length).fill(null)];
}

/** Positions with a target in all micro-batches: for the next token, and at every prediction depth. */
export function scoredPositions(batches: readonly Batch[], depths: number): number[] {
  return Array.from({ length: 1 + depths }, (_, depth) => batches.reduce(
    (sum, batch) => sum + countScored(depth === 0 ? batch.labels : mtpLabels(batch, depth)), 0));
}
