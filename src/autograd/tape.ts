/** Reverse-mode differentiation over recorded ops. */
import { add } from "../ops/elementwise.ts";
import { noGrad, recordOps, type OpRecord } from "../ops/op.ts";
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
   * @returns the gradients of all leaves that require one and were reached. The tape is empty afterwards.
   */
  backward(outputs: readonly Tensor[], seeds: readonly Tensor[]): GradientMap {
    const gradients: GradientMap = new Map();
    outputs.forEach((output, i) => accumulate(gradients, output.key, seeds[i]!.retain()));
    const records = this.#records;
    this.#records = [];
    const produced = new Set(records.flatMap((record) => record.outputs.map((output) => output.key)));
    for (let i = records.length - 1; i >= 0; i--) {
      const record = records[i]!;
      const incoming = record.outputs.map(({ key }) => {
        const gradient = gradients.get(key) ?? null;
        gradients.delete(key);
        return gradient;
      });
      if (incoming.some((gradient) => gradient !== null)) {
        scope(() => {
          const shaped = incoming.map((gradient, j) => gradient && gradient.reshape(record.outputs[j]!.shape));
          const results = record.backward(shaped);
          for (const { key, argument } of record.inputs) {
            const result = results[argument];
            if (result) accumulate(gradients, key, result.retain());
          }
        });
      }
      for (const gradient of incoming) gradient?.release();
      record.release();
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

function accumulate(gradients: GradientMap, key: number, gradient: Tensor): void {
  const existing = gradients.get(key);
  if (!existing) {
    gradients.set(key, gradient);
    return;
  }
  scope(() => {
    const sum = noGrad(() => add(existing.reshape([existing.size]), gradient.reshape([gradient.size])));
    gradients.set(key, sum.retain());
  });
  existing.release();
  gradient.release();
}
