import { recorder, recordOps } from "../ops/op.ts";
import { register, scope } from "../tensor/scope.ts";
import { localsOf } from "../tensor/sharded.ts";
import { isFloat, type Tensor } from "../tensor/tensor.ts";
import { type GradientMap, Tape } from "./tape.ts";

/**
 * Runs `body` and keeps its inputs alone for the backward pass, which runs it a second time for whatever its
 * ops would have kept. The gradients are those of a plain run, bit for bit: the same launches on the same
 * values.
 *
 * @param inputs what `body` reads besides parameters; kept until the backward pass
 * @param body the same work at every call, without effects; returns its results. The first run is given null,
 *   the second what the first returned of whole numbers, such as choices that it must make alike
 * @returns the results of the first call
 */
export function recompute(
  inputs: readonly Tensor[], body: (made: readonly Tensor[] | null) => Tensor[],
): Tensor[] {
  const listener = recorder();
  if (!listener) return scope(() => body(null));
  const leaves = new Set<number>();
  const made = new Set<number>();
  const results = recordOps((record) => {
    for (const { key } of record.inputs) if (!made.has(key)) leaves.add(key);
    for (const { key } of record.outputs) made.add(key);
    record.release();
  }, () => scope(() => body(null)));
  const choices = results.filter(({ dtype }) => !isFloat(dtype));
  for (const result of results) result.relu2Key = null; // known to the first run alone
  for (const kept of [...inputs, ...choices]) kept.retain();
  listener({
    name: "recompute", lane: null,
    inputs: [...leaves].map((key, argument) => ({ key, argument })),
    outputs: results.flatMap(localsOf).map(({ key, shape }) => ({ key, shape })),
    backward(grads) {
      const gradients = scope(() => runAgain(() => body(choices), grads));
      register({
        release() {
          for (const gradient of gradients.values()) gradient.release();
        },
      });
      return [...leaves].map((key) => gradients.get(key));
    },
    release() {
      for (const kept of [...inputs, ...choices]) kept.release();
    },
  });
  return results;
}

function runAgain(body: () => Tensor[], grads: readonly (Tensor | null)[]): GradientMap {
  const tape = new Tape();
  try {
    const results = tape.run(() => scope(body)).flatMap(localsOf);
    const reached = grads.flatMap((grad, i) => (grad ? [{ result: results[i]!, grad }] : []));
    return tape.backward(reached.map(({ result }) => result), reached.map(({ grad }) => grad));
  } finally {
    tape.dispose();
  }
}
