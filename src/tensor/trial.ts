import type { Trial } from "../kernel/tuner.ts";
import type { Device } from "./device.ts";
import { fillNormal } from "./philox.ts";
import { scope, unscoped } from "./scope.ts";
import { sizeOf } from "./ndarray.ts";
import type { Tensor } from "./tensor.ts";

/**
 * Makes a trial of a tunable: `inputs` once, then `run` on them with each candidate, as often as measured.
 *
 * @param inputs  makes scratch tensors by name; they are freed with the trial
 * @param run     records one candidate and returns what it computed
 */
export function trial<T extends Readonly<Record<string, { dispose(): void }>>, C extends string>(
  inputs: () => T, run: (inputs: T, candidate: C) => Tensor | Tensor[],
): Trial<C> {
  const made = unscoped(inputs);
  return {
    run(candidate) {
      const outputs = unscoped(() => scope(() => run(made, candidate)));
      return Array.isArray(outputs) ? outputs : [outputs];
    },
    dispose: () => Object.values(made).forEach((tensor) => tensor.dispose()),
  };
}

const DRAWN = 8191; // a prime, so that rows of any length differ

/** A scratch tensor of normal values; the same for the same shape and stream. */
export function randomTensor(device: Device, shape: readonly number[], stream = 0, deviation = 1): Tensor {
  const values = new Float32Array(sizeOf(shape));
  const drawn = fillNormal({ seed: 1, stream, step: 0 }, new Float32Array(Math.min(values.length, DRAWN)));
  for (let at = 0; at < values.length; at += DRAWN) {
    values.set(at + DRAWN <= values.length ? drawn : drawn.subarray(0, values.length - at), at);
  }
  return device.tensor(deviation === 1 ? values : values.map((x) => x * deviation), shape);
}
