/** What adds up over the micro-batches of a step: losses, and what routers chose. */
import { everyRank, sumOverGroup } from "../ops/collectives.ts";
import { accumulate, multiply } from "../ops/elementwise.ts";
import { expert_load } from "../ops/moe.ts";
import { localsOf, onRank, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { OverflowCounts } from "./overflow.ts";
import type { StagePass } from "./passes.ts";
import type { StageInputs } from "./rank_inputs.ts";

/** What adds up over the micro-batches of a step, on every rank of a stage. */
export interface StageSums {
  /** f32 [3 + depths]: loss, balancing loss, gradient norm, the losses of the prediction depths. */
  readonly scalars: Tensor;
  /** Tokens per expert, u32 by the path of the layer. */
  readonly loads: ReadonlyMap<string, Tensor>;
  /** Choices by their scores alone in the step so far, u32 [1, E] by layer; for `global_aux_loss`. */
  readonly soFar: ReadonlyMap<string, Tensor>;
  /** Where the biases are going by quantiles, f32 [E] by layer; none for other updates. */
  readonly estimates: ReadonlyMap<string, Tensor>;
  /** Where the layout has an expert_budget. */
  readonly overflow: OverflowCounts | null;
}

/** Place of the gradient norm among the scalars. */
export const NORM = 2;

/** All of them. */
export function sumsOf({ scalars, loads, soFar, estimates, overflow }: StageSums): Tensor[] {
  return [
    scalars, ...loads.values(), ...soFar.values(), ...estimates.values(),
    ...overflow ? [overflow.missing, overflow.total] : [],
  ];
}

/** Adds what a pass found to the sums of its stage. */
export function collect(pass: StagePass, { shares }: Pick<StageInputs, "shares">, sums: StageSums): void {
  const { main, aux, mtp } = pass;
  if (main ?? aux) {
    const packed = shardedOf(localsOf(sums.scalars).map((like, rank) =>
      packScalars(like, onRank([main, aux, null, ...mtp], rank))));
    accumulate(sums.scalars, multiply(packed, shares));
  }
  for (const { index, layer } of pass.routing) {
    const load = sums.loads.get(layer);
    if (load) expert_load(load, index);
  }
  sums.overflow?.collect(pass.overflow);
}

function packScalars(like: Tensor, values: readonly (Tensor | null)[]): Tensor {
  const packed = like.device.zeros(like.shape);
  values.forEach((value, i) => value && putInto(packed, i, value));
  return packed;
}

/** x[i] = value on every rank. */
export function putInto(x: Tensor, i: number, value: Tensor): void {
  localsOf(x).forEach(({ device, storage, byteOffset }, rank) => {
    const from = localsOf(value)[rank]!;
    device.stream.copy(from.storage, from.byteOffset, storage, byteOffset + 4 * i, 4);
  });
}

/** Sums every one of some sums over the ranks of a stage. */
export function sumOverRanks(sums: readonly Tensor[]): void {
  for (const x of sums) {
    const sum = sumOverGroup(x, everyRank(x));
    if (sum !== x) x.copyFrom(sum);
  }
}

/** After a step: loss, gradient norm, balancing loss, the losses of the prediction depths. */
export async function readScalars(
  sums: readonly StageSums[], depths: number,
): Promise<[number, number, number, number[]]> {
  const stages: number[][] = [];
  for (const { scalars } of sums) stages.push(Array.from(await localsOf(scalars)[0]!.read()));
  const total = (i: number) => stages.reduce((sum, values) => sum + values[i]!, 0);
  const mtp = Array.from({ length: depths }, (_, i) => total(NORM + 1 + i));
  return [total(0), stages.at(-1)![NORM]!, total(1), mtp];
}

/** Largest load of an expert over the mean load, minus 1, worst layer; null without experts. */
export async function maxViolation(sums: readonly StageSums[]): Promise<number | null> {
  let worst: number | null = null;
  for (const load of sums.flatMap(({ loads }) => [...loads.values()])) {
    const counts = Array.from(await localsOf(load)[0]!.read());
    const mean = counts.reduce((a, b) => a + b, 0) / counts.length;
    worst = Math.max(worst ?? 0, Math.max(...counts) / mean - 1);
  }
  return worst;
}
