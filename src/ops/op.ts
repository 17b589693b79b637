/**
 * The contract of an op: a forward that records launches, a backward, and what passes between them. An op
 * called while a tape listens is recorded; called inside another op it is just its forward. With sharded
 * tensors among its arguments it is called once for every rank.
 */
import { asOp, currentLane, forRank, type Lane } from "../gpu/lane.ts";
import { keep, type Kept } from "../tensor/again.ts";
import { scope } from "../tensor/scope.ts";
import { DTypeError } from "../tensor/errors.ts";
import { onRank, ranksOf, Sharded } from "../tensor/sharded.ts";
import { isFloat, isHalf, Tensor } from "../tensor/tensor.ts";

/** Gradients by argument position; null or missing where there is none. */
export type Gradients = readonly (Tensor | null | undefined)[];

/**
 * Where the gradients of one backward go. An op need not ask; then the tape copies and adds in launches of
 * its own what the op could have done in its last store.
 */
export interface Destinations {
  /** f32 memory for the gradient of argument `i`: the place where it is wanted, or a new tensor. */
  empty(i: number, like: Pick<Tensor, "device" | "shape">): Tensor;
  /**
   * The gradient that argument `i` has from other ops so far, or null. Whoever asks adds it: the gradient
   * that he returns is the sum of both.
   */
  soFar(i: number): Tensor | null;
}

/** No places of their own: every gradient is a new tensor. */
export const NOWHERE: Destinations = {
  empty: (_, like) => like.device.empty(like.shape),
  soFar: () => null,
};

export interface OpContext<S> {
  /** Keeps values for the backward pass; tensors among them stay alive until then. */
  save(values: S): void;
  /** True when argument `i` wants a gradient. */
  needs(i: number): boolean;
}

export interface OpDefinition<A extends unknown[], R extends Tensor | Tensor[], S> {
  readonly name: string;
  /** Positions of arguments that are changed in place. Such an op has no backward. */
  readonly mutates?: readonly number[];
  /** Positions of arguments that may be stored as f16 or bf16; everywhere else halves are refused. */
  readonly halves?: readonly number[];
  /**
   * Positions of arguments that, where they are max(h, 0)^2 (`Tensor.relu2Key`), get the gradient of h from
   * this op instead of their own.
   */
  readonly relu2?: readonly number[];
  /** Positions of weights whose gradients are computed apart from those of other arguments. */
  readonly weights?: readonly number[];
  forward(ctx: OpContext<S>, ...args: A): R;
  /**
   * @param saved what forward saved
   * @param grads one gradient per output, null where the output was not used; then, for every output that
   *   is max(h, 0)^2, what other ops gave as the gradient of h
   * @param needs one flag per argument
   */
  backward?(saved: S, grads: (Tensor | null)[], needs: readonly boolean[], into: Destinations): Gradients;
}

/** An op as called: its forward's arguments and result. */
export interface Op<A extends unknown[] = never[], R extends Tensor | Tensor[] = Tensor | Tensor[]> {
  (...args: A): R;
  readonly opName: string;
  readonly mutates: readonly number[];
  readonly differentiable: boolean;
}

/** One executed op on a tape. */
export interface OpRecord {
  readonly name: string;
  /** Whose work it was. */
  readonly lane: Lane | null;
  /** Tensor arguments that want a gradient, by `Tensor.key`. */
  readonly inputs: readonly { key: number; argument: number }[];
  readonly outputs: readonly { key: number; shape: readonly number[] }[];
  /** As in the definition. */
  readonly weights: readonly number[];
  /** @param only arguments whose gradients are wanted now; default: all. Others may come by another call. */
  backward(
    grads: (Tensor | null)[], into: Destinations, only?: (argument: number) => boolean,
  ): Gradients;
  /** Frees what was saved. */
  release(): void;
}

let listening: ((record: OpRecord) => void) | null = null;

/** All ops by name. */
export const registry = new Map<string, Op>();

/** Sends every differentiable op that `body` runs to `listener`. */
export function recordOps<T>(listener: (record: OpRecord) => void, body: () => T): T {
  return withRecorder(listener, body);
}

let watching: ((name: string, args: readonly unknown[]) => void) | null = null;

/** Shows every op that `body` runs, those inside of ops too, to `watcher`: its name and its arguments. */
export function watchOps<T>(watcher: (name: string, args: readonly unknown[]) => void, body: () => T): T {
  const outer = watching;
  watching = watcher;
  try {
    return body();
  } finally {
    watching = outer;
  }
}

/** Where differentiable ops go that run now; null where nobody records them. */
export function recorder(): ((record: OpRecord) => void) | null {
  return listening;
}

/** Runs `body` without recording. */
export function noGrad<T>(body: () => T): T {
  return withRecorder(null, body);
}

function withRecorder<T>(listener: typeof listening, body: () => T): T {
  const outer = listening;
  listening = listener;
  try {
    return body();
  } finally {
    listening = outer;
  }
}

/** Makes an op from its definition and enters it into the registry. */
export function defineOp<A extends unknown[], R extends Tensor | Tensor[], S>(
  definition: OpDefinition<A, R, S>,
): Op<A, R> {
  const { name, backward, halves = [], relu2 = [], weights = [] } = definition;
  const call = (...args: A): R => {
    const ranks = ranksOf(args);
    if (ranks > 0) {
      return gathered(Array.from({ length: ranks }, (_, rank) =>
        forRank(rank, () => call(...onRank(args, rank)))));
    }
    const listener = listening;
    watching?.(name, args);
    for (let i = 0; i < args.length; i++) {
      const argument = args[i];
      if (argument instanceof Tensor && isHalf(argument.dtype) && !halves.includes(i)) {
        throw new DTypeError(`${name}: argument ${i + 1} must be f32, found ${argument.dtype}.`);
      }
    }
    const needs = args.map((argument) => argument instanceof Tensor && argument.requiresGrad);
    const recording = listener !== null && backward !== undefined && needs.includes(true);
    let saved: Kept<S> | null = null;
    const ctx: OpContext<S> = {
      save(values) {
        if (recording) saved = keep(values);
      },
      needs: (i) => recording && needs[i] === true,
    };
    let result: R;
    let lane: Lane | null = null;
    try {
      result = asOp(name, () => {
        lane = currentLane();
        return scope(() => noGrad(() => definition.forward(ctx, ...args)));
      });
    } catch (error) {
      (saved as Kept<S> | null)?.release();
      throw error;
    }
    if (recording) {
      const outputs = Array.isArray(result) ? result : [result as Tensor];
      for (const output of outputs) if (isFloat(output.dtype)) output.requiresGrad = true;
      const kept = saved as Kept<S> | null;
      listener({
        name, lane, weights,
        inputs: args.flatMap((argument, i) => {
          if (!needs[i]) return [];
          const { key, relu2Key } = argument as unknown as Tensor;
          return [{ key: relu2.includes(i) ? relu2Key ?? key : key, argument: i }];
        }),
        outputs: [
          ...outputs.map(({ key, shape }) => ({ key, shape })),
          ...outputs.flatMap(({ relu2Key, shape }) => (relu2Key === null ? [] : [{ key: relu2Key, shape }])),
        ],
        backward(grads, into, only = () => true) {
          const wanted = needs.map((need, i) => need && only(i));
          return scope(() =>
            noGrad(() => backward.call(definition, (kept?.values() ?? null) as S, grads, wanted, into)));
        },
        release: () => kept?.release(),
      });
    }
    return result;
  };
  const op = Object.assign(call, {
    opName: name, mutates: definition.mutates ?? [], differentiable: backward !== undefined,
  }) as Op<A, R>;
  if (registry.has(name)) throw new Error(`An op named ${name} is already registered.`);
  registry.set(name, op as unknown as Op);
  return op;
}

/** The results of all ranks as one. */
function gathered<R extends Tensor | Tensor[]>(results: readonly R[]): R {
  const [first] = results;
  if (!Array.isArray(first)) return new Sharded(results as readonly Tensor[]) as unknown as R;
  return first.map((_, i) => new Sharded(results.map((result) => (result as Tensor[])[i]!))) as unknown as R;
}
