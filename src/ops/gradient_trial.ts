/** Trials of candidates whose backward pass counts as well. */
import type { Tensor } from "../tensor/tensor.ts";
import { add } from "./elementwise.ts";
import { noGrad, NOWHERE, type OpRecord, recordOps } from "./op.ts";

/**
 * Runs `body` on inputs, and its ops backward.
 * @param seeds one gradient per output of `body`, of its shape
 * @returns the outputs, then the gradient of every input
 */
export function withGradients(
  inputs: readonly Tensor[], seeds: readonly Tensor[], body: () => readonly Tensor[],
): Tensor[] {
  const records: OpRecord[] = [];
  for (const input of inputs) input.requiresGrad = true;
  const outputs = recordOps((record) => records.push(record), body);
  const gradients = new Map(outputs.map(({ key }, i) => [key, seeds[i]!]));
  for (const record of records.toReversed()) {
    const incoming = record.outputs.map(({ key, shape }) => gradients.get(key)?.reshape(shape) ?? null);
    const results = record.backward(incoming, NOWHERE);
    for (const { key, argument } of record.inputs) {
      const [found, result] = [gradients.get(key), results[argument]];
      if (result) gradients.set(key, found ? noGrad(() => add(found, result.reshape(found.shape))) : result);
    }
    record.release();
  }
  return [...outputs, ...inputs.flatMap(({ key }) => gradients.get(key) ?? [])];
}
