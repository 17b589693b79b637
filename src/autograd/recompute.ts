import { recorder, recordOps } from "../ops/op.ts";
import { keep } from "../tensor/again.ts";
import { staying } from "../tensor/offload.ts";
import { register, scope } from "../tensor/scope.ts";
import { localsOf } from "../tensor/sharded.ts";
import { isFloat, type Tensor } from "../tensor/tensor.ts";
import { Tape } from "./tape.ts";

export interface RecomputeOptions {
  /**
   * Whether the memory of the results is given back too, once whoever reads them now is done. The second run
   * is at their first use in the backward pass then. For results that are large and cheap to make.
   */
  readonly discard?: boolean;
}

/** A second run, with what the backward pass needs of it. */
interface Second {
  readonly tape: Tape;
  readonly results: readonly Tensor[];
}

/**
 * Runs `body` and keeps its inputs alone for the backward pass, which runs it a second time for whatever its
 * ops would have kept. The gradients are those of a plain run, bit for bit: the same launches on the same
 * values.
 *
 * @param inputs what `body` reads besides parameters; kept until the backward pass
 * @param body the same work at every call, without effects; returns its results. The first run is given null,
 *   the second what the first returned of whole numbers, such as choices that it must make alike. Then
 *   follow the inputs: what the second run reads of them may lie elsewhere.
 * @returns the results of the first call
 */
export function recompute(
  inputs: readonly Tensor[],
  body: (made: readonly Tensor[] | null, inputs: readonly Tensor[]) => Tensor[],
  { discard = false }: RecomputeOptions = {},
): Tensor[] {
  const listener = recorder();
  if (!listener) return scope(() => body(null, inputs));
  const leaves = new Set<number>();
  const made = new Set<number>();
  const results = recordOps((record) => {
    for (const { key } of record.inputs) if (!made.has(key)) leaves.add(key);
    for (const { key } of record.outputs) made.add(key);
    record.release();
  }, () => scope(() => body(null, inputs)));
  const choices = results.filter(({ dtype }) => !isFloat(dtype));
  for (const result of results) result.relu2Key = null; // known to the first run alone
  const kept = keep({ inputs, choices });
  let second: Second | null = null;
  const again = () => second ??= runAgain(() => {
    const { inputs: same, choices: chosen } = kept.values();
    return body(chosen, same);
  });
  const outputs = results.flatMap(localsOf);
  if (discard) {
    outputs.forEach((output, i) => {
      if (isFloat(output.dtype)) {
        output.again = { byteOffset: output.byteOffset, make: () => again().results[i]! };
      }
    });
  }
  const forget = () => {
    second?.tape.dispose();
    for (const result of second?.results ?? []) result.release();
    second = null;
  };
  listener({
    name: "recompute", lane: null, weights: [],
    inputs: [...leaves].map((key, argument) => ({ key, argument })),
    outputs: outputs.map(({ key, shape }) => ({ key, shape })),
    backward(grads) {
      const { tape, results: reached } = again();
      const seeded = grads.flatMap((grad, i) => (grad ? [{ result: reached[i]!, grad }] : []));
      for (const result of reached) result.release(); // the tape holds what it needs of them
      second = { tape, results: [] };
      const gradients = scope(() =>
        tape.backward(seeded.map(({ result }) => result), seeded.map(({ grad }) => grad)));
      register({
        release() {
          for (const gradient of gradients.values()) gradient.release();
        },
      });
      return [...leaves].map((key) => gradients.get(key));
    },
    release() {
      forget();
      kept.release();
    },
  });
  return results;
}

function runAgain(body: () => Tensor[]): Second {
  const tape = new Tape();
  try {
    return scope(() => {
      const results = staying(() => tape.run(body)).flatMap(localsOf);
      for (const result of results) result.retain();
      return { tape, results };
    });
  } catch (error) {
    tape.dispose();
    throw error;
  }
}
