/** Reverse-mode differentiation over recorded ops. */
import { asBackward } from "../gpu/lane.ts";
import { accumulate as addTo, add } from "../ops/elementwise.ts";
import { type Destinations, noGrad, recordOps, type OpRecord } from "../ops/op.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Gradients by `Tensor.key`. Their holder frees them. */
export type GradientMap = Map<number, Tensor>;

/** A record of ops in the order they ran, good for one walk backwards. */
export class Tape {
  #records: OpRecord[] = [];

  /** Runs `body` and records its differentiable ops. */
  run<T>(body: () => T): T {
    return recordOps((record) => this.#records.push(record), body);
  }

  /** Number of recorded ops. */
  get length(): number {
    return this.#records.length;
  }

  /**
   * Walks back from `outputs` with the gradients `seeds` (for a scalar loss: a tensor of one element, 1).
   * @param places where the gradients of leaves are put, by the leaf's key; elsewhere those of other leaves
   * @returns the gradients of all leaves that require one and were reached. The tape is empty afterwards.
   */
  backward(outputs: readonly Tensor[], seeds: readonly Tensor[], places?: GradientMap): GradientMap {
    const gradients: GradientMap = new Map();
    const produced = new Set(this.#records.flatMap((record) => record.outputs.map((output) => output.key)));
    try {
      outputs.forEach((output, i) => accumulate(gradients, output.key, seeds[i]!.retain()));
      for (let record = this.#records.pop(); record; record = this.#records.pop()) {
        const last = record;
        asBackward(last.lane, () => walkBack(last, gradients, places));
      }
    } catch (error) {
      for (const gradient of gradients.values()) gradient.release();
      this.dispose();
      throw error;
    }
    for (const [key, gradient] of gradients) {
      if (!produced.has(key)) continue;
      gradient.release(); // an output nobody asked about
      gradients.delete(key);
    }
    return gradients;
  }

  /** Forgets everything recorded without walking back. */
  dispose(): void {
    for (const record of this.#records.splice(0)) record.release();
  }
}

/** Turns the gradients of one op's outputs into those of its inputs, and frees what the op saved. */
function walkBack(record: OpRecord, gradients: GradientMap, places?: GradientMap): void {
  const incoming = record.outputs.map(({ key }) => {
    const gradient = gradients.get(key) ?? null;
    gradients.delete(key);
    return gradient;
  });
  try {
    if (incoming.every((gradient) => gradient === null)) return;
    scope(() => {
      const shaped = incoming.map((gradient, i) => gradient && gradient.reshape(record.outputs[i]!.shape));
      const added = new Map<number, number>(); // by key: the argument whose gradient is a sum already
      const results = record.backward(shaped, destinations(record, gradients, added, places));
      for (const [key, argument] of added) {
        gradients.get(key)!.release();
        gradients.set(key, results[argument]!.retain());
      }
      for (const { key, argument } of record.inputs) {
        const result = results[argument];
        if (result && added.get(key) !== argument) {
          accumulate(gradients, key, result.retain(), places?.get(key));
        }
      }
    });
  } finally {
    for (const gradient of incoming) gradient?.release();
    record.release();
  }
}

function destinations(
  { inputs }: OpRecord, gradients: GradientMap, added: Map<number, number>, places?: GradientMap,
): Destinations {
  const keyOf = (i: number) => inputs.find(({ argument }) => argument === i)?.key ?? 0; // no key is 0
  return {
    empty(i, like) {
      const key = keyOf(i);
      const place = gradients.has(key) ? undefined : places?.get(key);
      const isFree = place && inputs.every((input) => input.key !== key || input.argument === i);
      return isFree ? place.reshape(like.shape) : like.device.empty(like.shape);
    },
    soFar(i) {
      const key = keyOf(i);
      const sum = places?.has(key) || added.has(key) ? undefined : gradients.get(key);
      if (sum) added.set(key, i);
      return sum ?? null;
    },
  };
}

/** Adds to the gradient under `key`, in its place if it has one; takes over the caller's reference. */
function accumulate(gradients: GradientMap, key: number, gradient: Tensor, place?: Tensor): void {
  const existing = gradients.get(key);
  if (place) {
    if (!existing) gradients.set(key, place.retain());
    try {
      const isThere = gradient.storage === place.storage && gradient.byteOffset === place.byteOffset;
      if (!existing && !isThere) place.copyFrom(gradient);
      else if (existing) scope(() => noGrad(() => addTo(place, gradient.reshape(place.shape))));
    } finally {
      gradient.release();
    }
    return;
  }
  if (!existing) {
    gradients.set(key, gradient);
    return;
  }
  try {
    scope(() => {
      const sum = noGrad(() => add(existing.reshape([existing.size]), gradient.reshape([gradient.size])));
      gradients.set(key, sum.retain());
    });
    existing.release();
  } finally {
    gradient.release();
  }
}
