/**
 * In which order the ranks of a pipeline work: 1F1B, interleaved 1F1B with groups of micro-batches and
 * several chunks per rank, and an order of two passes at once, of which one computes while the tokens of the
 * other travel to their experts. All of it is data. Spec: Megatron Core's schedules.
 */
import { UsageError } from "../tensor/errors.ts";
import type { PassPiece } from "../nn/context.ts";
import type { Layout } from "./layout.ts";
import { broken } from "./mesh.ts";

/** One pass of one micro-batch through one chunk of a rank. */
export interface Action {
  readonly kind: "forward" | "backward";
  readonly micro: number;
  readonly chunk: number;
  /** Two neighbouring actions of a rank that run at the same time have the same number. */
  readonly pair?: number;
}

export interface PipelineSchedule {
  readonly pp: number;
  readonly vpp: number;
  readonly micro_batches: number;
  /** What each pipeline rank does, in order. */
  readonly ranks: readonly (readonly Action[])[];
}

/** Most forward passes of all ranks that a schedule may have. */
const MAX_PASSES = 2 ** 20;

/**
 * The schedule of a layout: interleaved where vpp > 1, otherwise 1F1B; under `overlap` with one more forward
 * pass of warm-up, and passes in pairs.
 * @throws UsageError when the micro-batches do not fit the layout, or passes cannot be paired
 */
export function scheduleOf(
  layout: Pick<Layout, "pp" | "vpp" | "micro_batch_group" | "overlap">, microBatches: number,
): PipelineSchedule {
  const { pp, vpp, micro_batch_group: group, overlap } = layout;
  if (!Number.isSafeInteger(microBatches) || microBatches < 1) {
    broken("micro_batches is a count", "a whole number above 0", microBatches);
  }
  if (microBatches * pp * vpp > MAX_PASSES) {
    const found = `${microBatches} * ${pp} * ${vpp}`;
    broken("a schedule has limits", `at most ${MAX_PASSES} passes forward`, found);
  }
  if (vpp > 1) return interleaved(pp, vpp, microBatches, group, overlap);
  if (!overlap) return oneForwardOneBackward(pp, microBatches);
  checkPairing(layout);
  return interleaved(1, 1, microBatches, 1, overlap);
}

/**
 * Refuses pairs of passes that would wait for each other.
 * @throws UsageError
 */
export function checkPairing({ pp, vpp }: Pick<Layout, "pp" | "vpp">): void {
  if (pp === 1 || vpp > 1) return;
  broken("paired passes need interleaving or one stage", "vpp above 1", `vpp=1 with pp=${pp}`);
}

/**
 * 1F1B: rank p runs min(pp - p - 1, M) forward passes, then forward and backward by turns, then what backward
 * passes are left. At most min(M, pp - p) micro-batches are alive on it.
 */
function oneForwardOneBackward(pp: number, microBatches: number): PipelineSchedule {
  const table = Array.from({ length: microBatches }, (_, micro) => ({ micro, chunk: 0 }));
  const ranks = Array.from({ length: pp }, (_, p) =>
    inTurns(table, table, Math.min(pp - p - 1, microBatches), false));
  return { pp, vpp: 1, micro_batches: microBatches, ranks };
}

/**
 * Interleaved 1F1B. Micro-batches come in groups of `group`, each of which passes chunk 0, then chunk 1 and
 * so on; backward passes take the chunks in the other order. Warm-up of rank p: 2 (pp - p - 1) + (vpp - 1) *
 * group forward passes, one more when passes are paired.
 */
function interleaved(
  pp: number, vpp: number, microBatches: number, group: number, overlap: boolean,
): PipelineSchedule {
  checkGroups(pp, microBatches, group);
  const forward = virtualSteps(vpp, microBatches, group);
  const backward = forward.map(({ micro, chunk }) => ({ micro, chunk: vpp - 1 - chunk }));
  const ranks = Array.from({ length: pp }, (_, p) => {
    const warmup = 2 * (pp - p - 1) + (vpp - 1) * group + (overlap ? 1 : 0);
    return inTurns(forward, backward, Math.min(warmup, microBatches * vpp), overlap);
  });
  return { pp, vpp, micro_batches: microBatches, ranks };
}

/**
 * Refuses groups with which an interleaved schedule would stop: fewer micro-batches than pp in one.
 * @throws UsageError
 */
export function checkGroups(pp: number, microBatches: number, group: number): void {
  if (group < pp) {
    broken("an interleaved group has at least pp micro-batches", `group >= ${pp}`, group);
  }
  if (group > microBatches) {
    broken("an interleaved group has at most all micro-batches", `group <= ${microBatches}`, group);
  }
  const last = microBatches % group;
  if (last !== 0 && last < pp) {
    broken("the last interleaved group has at least pp micro-batches",
      `micro_batches mod ${group} to be 0 or at least ${pp}`, `${microBatches} mod ${group} = ${last}`);
  }
}

type Step = Pick<Action, "micro" | "chunk">;

/** The order of the forward passes of every rank. */
export function virtualSteps(vpp: number, microBatches: number, group: number): Step[] {
  const steps: Step[] = [];
  for (let first = 0; first < microBatches; first += group) {
    for (let chunk = 0; chunk < vpp; chunk++) {
      for (let micro = first; micro < Math.min(first + group, microBatches); micro++) {
        steps.push({ micro, chunk });
      }
    }
  }
  return steps;
}

/** `warmup` forward passes, then forward and backward by turns, then the rest of the backward passes. */
function inTurns(
  forward: readonly Step[], backward: readonly Step[], warmup: number, paired: boolean,
): Action[] {
  const actions: Action[] = forward.slice(0, warmup).map((step) => ({ kind: "forward", ...step }));
  backward.forEach((step, j) => {
    const ahead = forward[j + warmup];
    const pair = paired && ahead ? { pair: j } : {};
    if (ahead) actions.push({ kind: "forward", ...ahead, ...pair });
    actions.push({ kind: "backward", ...step, ...pair });
  });
  return actions;
}

/** An action with the rank that does it. */
export interface RankAction extends Action {
  readonly rank: number;
}

/**
 * One order of all actions for a controller that does one at a time: each rank's own order is kept, a forward
 * pass of a stage comes after that of the stage before, a backward pass after that of the stage behind and
 * after its own forward pass. What begins at the same time stands together, ranks ascending; both passes of a
 * pair stand side by side, and what either needs comes before both.
 * @throws UsageError when a schedule stops before its end, or does not do every pass once
 */
export function interleave(schedule: PipelineSchedule): RankAction[] {
  return simulate(schedule, { forward: 1, backward: 1 }).map(({ start: _start, ...action }) => action);
}

/** An action with the time at which it begins. */
export interface TimedAction extends RankAction {
  readonly start: number;
}

/** How long a forward and a backward pass of a chunk take. */
export interface PassTimes {
  readonly forward: number;
  readonly backward: number;
}

/**
 * When each action begins if every rank begins its next one as soon as it can and messages take no time.
 * Ordered by time, then by rank.
 * @throws UsageError as `interleave`
 */
export function simulate(schedule: PipelineSchedule, times: PassTimes): TimedAction[] {
  const { pp, vpp, ranks, micro_batches: microBatches } = schedule;
  checkComplete(schedule);
  const last = pp * vpp - 1;
  const key = (kind: Action["kind"], stage: number, micro: number) => `${kind} ${stage} ${micro}`;
  /** When a pass ends. */
  const ends = new Map<string, number>();
  const free = ranks.map(() => 0);
  const next = ranks.map(() => 0);
  const found: TimedAction[] = [];
  const needs = (rank: number, { kind, micro, chunk }: Action): string[] => {
    const stage = chunk * pp + rank;
    if (kind === "forward") return stage === 0 ? [] : [key("forward", stage - 1, micro)];
    const own = key("forward", stage, micro);
    return stage === last ? [own] : [own, key("backward", stage + 1, micro)];
  };
  const total = 2 * microBatches * pp * vpp;
  while (found.length < total) {
    const before = found.length;
    ranks.forEach((actions, rank) => {
      while (next[rank]! < actions.length) {
        const unit = unitAt(actions, next[rank]!);
        const ready = unit.flatMap((action) => needs(rank, action)).map((pass) => ends.get(pass) ?? Infinity);
        const start = Math.max(free[rank]!, ...ready);
        if (start === Infinity) break;
        free[rank] = unit.reduce((end, { kind }) => end + times[kind], start);
        for (const action of unit) {
          found.push({ rank, ...action, start });
          ends.set(key(action.kind, action.chunk * pp + rank, action.micro), free[rank]);
        }
        next[rank]! += unit.length;
      }
    });
    if (found.length > before) continue;
    const rank = ranks.findIndex((actions, p) => next[p]! < actions.length);
    const [action, missing] = unitAt(ranks[rank]!, next[rank]!).flatMap((each) =>
      needs(rank, each).filter((pass) => !ends.has(pass)).map((pass) => [each, pass] as const))[0]!;
    const [kind, stage, micro] = missing.split(" ");
    throw new UsageError(
      `The schedule stops after ${before} of ${total} passes: rank ${rank} waits with the ${action.kind} `
      + `pass of micro-batch ${action.micro} in chunk ${action.chunk} for the ${kind} pass of micro-batch `
      + `${micro} in stage ${stage}.`);
  }
  return found.sort((a, b) => a.start - b.start || a.rank - b.rank);
}

/** The action at a position, with the other one of its pair. */
function unitAt(actions: readonly Action[], at: number): readonly Action[] {
  const { pair } = actions[at]!;
  return actions.slice(at, pair !== undefined && actions[at + 1]?.pair === pair ? at + 2 : at + 1);
}

function checkComplete({ pp, vpp, ranks, micro_batches: microBatches }: PipelineSchedule): void {
  if (ranks.length !== pp) {
    throw new UsageError(
      `A schedule has a list of actions for each rank: expected ${pp}, found ${ranks.length}.`);
  }
  ranks.forEach((actions, rank) => {
    const seen = new Set<string>();
    for (const { kind, micro, chunk } of actions) {
      const name = `the ${kind} pass of micro-batch ${micro} in chunk ${chunk}`;
      const exists = [[micro, microBatches], [chunk, vpp]].every(([i, n]) =>
        Number.isInteger(i) && i! >= 0 && i! < n!);
      if (!exists) {
        throw new UsageError(`Rank ${rank} of the schedule: expected micro-batches below ${microBatches} and `
          + `chunks below ${vpp}, found ${name}.`);
      }
      if (seen.has(name)) {
        throw new UsageError(`Rank ${rank} of the schedule does ${name} once, found it twice.`);
      }
      seen.add(name);
    }
    const expected = 2 * microBatches * vpp;
    if (seen.size !== expected) {
      throw new UsageError(`Rank ${rank} of the schedule: expected ${expected} passes, found ${seen.size}.`);
    }
  });
}

/** The most passes of micro-batches through chunks that each rank has begun and not yet led back. */
export function liveMicroBatches({ ranks }: PipelineSchedule): number[] {
  return ranks.map((actions) => {
    let [live, most] = [0, 0];
    for (const { kind } of actions) {
      live += kind === "forward" ? 1 : -1;
      most = Math.max(most, live);
    }
    return most;
  });
}

/**
 * Time that a rank waits, by the time it works, where every stage takes equally long: (pp - 1) / (M vpp) for
 * 1F1B, and for the interleaved schedule when its groups are of pp micro-batches.
 */
export function bubbleFraction(
  schedule: PipelineSchedule, times: PassTimes = { forward: 1, backward: 2 },
): number {
  const { vpp, micro_batches: microBatches } = schedule;
  const end = Math.max(...simulate(schedule, times).map(({ kind, start }) => start + times[kind]));
  const work = microBatches * vpp * (times.forward + times.backward);
  return (end - work) / work;
}

// Two passes at once (B7).

/** A piece of a pass through a block; `_weights`: the weight gradients that a backward pass puts off. */
export interface OverlapNode {
  readonly kind: "forward" | "backward";
  /** Position of the block among those of its pass, in the order of the forward pass. */
  readonly block: number;
  readonly node: PassPiece | "before_weights" | "experts_weights";
}

/** What may run at the same time: one node that communicates and one that computes. */
export interface OverlapSlot {
  readonly comm: OverlapNode | null;
  readonly compute: OverlapNode | null;
}

/** Layers up to and with one of experts; without one at the end of a stage. */
export interface OverlapBlock {
  readonly layers: readonly [from: number, to: number];
  readonly experts: boolean;
}

/** Cuts the layers of a stage, as a pattern, behind each layer of experts. */
export function overlapBlocks(pattern: string): OverlapBlock[] {
  const blocks: OverlapBlock[] = [];
  let from = 0;
  [...pattern].forEach((letter, i) => {
    const experts = letter === "E";
    if (!experts && i < pattern.length - 1) return;
    blocks.push({ layers: [from, i + 1], experts });
    from = i + 1;
  });
  return blocks;
}

/**
 * The order of a paired forward and backward pass: block i of the one beside block n - 1 - i of the other, so
 * that each exchange has the other pass's computation beside it. What one pass has more of follows by itself.
 * Weight gradients of the experts run while the gradient of their input travels, those of the mixers last.
 * @param forward blocks of the stage that the forward pass runs through
 * @param backward blocks of the stage that the backward pass runs through
 */
export function overlapOrder(
  forward: readonly OverlapBlock[], backward: readonly OverlapBlock[],
): OverlapSlot[] {
  const slots: OverlapSlot[] = [];
  for (let i = 0; i < Math.max(forward.length, backward.length); i++) {
    const back = backward.length - 1 - i;
    const has = { forward: forward[i], backward: backward[back] };
    const node = (kind: Action["kind"], name: OverlapNode["node"]): OverlapNode | null => {
      const block = has[kind];
      const inExperts = name !== "before" && name !== "before_weights";
      if (!block || (inExperts && !block.experts)) return null;
      return { kind, block: kind === "forward" ? i : back, node: name };
    };
    const pairs = [
      [node("backward", "combine"), node("forward", "before")],
      [node("forward", "dispatch"), node("backward", "experts")],
      [node("backward", "dispatch"), node("backward", "experts_weights")],
      [null, node("forward", "experts")],
      [node("forward", "combine"), node("backward", "before")],
      [null, node("backward", "before_weights")],
    ] as const;
    for (const [comm, compute] of pairs) if (comm || compute) slots.push({ comm, compute });
  }
  return slots;
}
