/** How far a changed model's predictions are from those it made before. */
import type { NemotronH } from "../models/nemotron_h.ts";
import { embedding } from "../ops/embedding.ts";
import { scope } from "../tensor/scope.ts";
import type { Batch } from "../train/packing.ts";

/** Most probabilities that are kept. */
const MOST_VALUES = 2 ** 24;

/** Predictions at some positions of some rows, and the distance of others from them. */
export class Divergence {
  readonly #model: NemotronH;
  readonly #batches: readonly Batch[];
  readonly #positions: Int32Array;
  #before: Float32Array[] = [];

  private constructor(model: NemotronH, batches: readonly Batch[]) {
    this.#model = model;
    this.#batches = batches;
    const { batch, seqlen } = batches[0]!;
    const most = Math.max(1, Math.floor(MOST_VALUES / model.config.vocab_size / batches.length));
    const stride = Math.ceil((batch * seqlen) / most);
    this.#positions = Int32Array.from(
      { length: Math.ceil((batch * seqlen) / stride) }, (_, i) => i * stride);
  }

  /** Remembers what the model says now. @param batches of one size, at least one */
  static async of(model: NemotronH, batches: readonly Batch[]): Promise<Divergence> {
    const divergence = new Divergence(model, batches);
    for (const batch of batches) divergence.#before.push(await divergence.#logProbabilities(model, batch));
    return divergence;
  }

  /**
   * Mean over the positions of KL(before || now), in nats.
   * @param model that is compared; default: the one whose predictions were remembered, as it is now
   */
  async measure(model = this.#model): Promise<number> {
    const V = this.#model.config.vocab_size;
    let sum = 0;
    let count = 0;
    for (const [b, batch] of this.#batches.entries()) {
      const [p, q] = [this.#before[b]!, await this.#logProbabilities(model, batch)];
      for (let i = 0; i < p.length; i++) sum += Math.exp(p[i]!) * (p[i]! - q[i]!);
      count += p.length / V;
    }
    return Math.max(0, sum / count);
  }

  async #logProbabilities(
    model: NemotronH, { batch: B, seqlen: L, input_ids, seq_idx }: Batch,
  ): Promise<Float32Array> {
    const { device, config: { hidden_size: D, vocab_size: V } } = model;
    const logits = scope(() => {
      const context = { seq_idx: device.tensor(seq_idx, [B, L]), step: null, routing: null };
      const h = model.hidden(device.tensor(input_ids, [B, L]), context).reshape([B * L, D]);
      return model.logits(
        embedding(device.tensor(this.#positions, [this.#positions.length]), h));
    });
    const values = await logits.read().finally(() => logits.dispose()) as Float32Array;
    for (let from = 0; from < values.length; from += V) {
      const row = values.subarray(from, from + V);
      const top = row.reduce((most, x) => Math.max(most, x), -Infinity);
      const total = row.reduce((all, x) => all + Math.exp(x - top), 0);
      const lse = top + Math.log(total);
      for (let i = 0; i < V; i++) row[i]! -= lse;
    }
    return values;
  }
}
