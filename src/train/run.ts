/**
 * A whole training run without files: data, model, trainer, evaluation.
 * The command line and the worker drive it.
 */
import { parseOffload } from "../nn/offload.ts";
import { parseRecompute } from "../nn/recompute.ts";
import type { NemotronH } from "../models/nemotron_h.ts";
import type { MeshModel } from "../parallel/model.ts";
import { ExpertOverflow } from "../tensor/errors.ts";
import { BatchPacker, bitsPerByte, type PackingState, type TokenCorpus } from "./packing.ts";
import { moeTrainingOf, precisionOf, type Recipe, scheduleOf } from "./recipe.ts";
import { type StepMetrics, Trainer } from "./trainer.ts";

export interface RunStep extends StepMetrics {
  readonly tokens_per_s: number;
  /** Tokens of all steps so far. */
  readonly tokens: number;
}

export interface Evaluation {
  /** Mean cross entropy of the next token, nats. */
  readonly loss: number;
  readonly bits_per_byte: number;
}

export class TrainingRun {
  readonly recipe: Recipe;
  readonly trainer: Trainer;
  readonly packer: BatchPacker;
  readonly validation: TokenCorpus;
  readonly #validationPacker: BatchPacker;

  /**
   * @param train, validation token corpora of the model's vocabulary
   * @param zero whether ranks that share parameters divide their update
   */
  constructor(
    model: NemotronH | MeshModel, recipe: Recipe, train: TokenCorpus, validation: TokenCorpus, zero = true,
  ) {
    const { batch, seqlen, seed, accumulate, beta1, beta2 } = recipe;
    this.recipe = recipe;
    this.validation = validation;
    this.packer = new BatchPacker(train, { batch, seqlen, seed });
    this.#validationPacker = new BatchPacker(validation, { batch, seqlen, seed });
    this.trainer = new Trainer(model, {
      ...recipe, zero, accumulate, schedule: scheduleOf(recipe), betas: [beta1, beta2],
      mtp_depths: model.config.num_nextn_predict_layers > 0 ? recipe.mtp_depths : 0,
      precision: precisionOf(recipe), recompute: parseRecompute(recipe.recompute),
      offload: parseOffload(recipe.offload), moe: moeTrainingOf(recipe),
    });
  }

  /** The model on its ranks. */
  get mesh(): MeshModel {
    return this.trainer.mesh;
  }

  /** The model of the first stage: on one rank all of it. */
  get model(): NemotronH {
    return this.trainer.model;
  }

  /** Steps that this object has done; those of runs it continues do not count. */
  done = 0;

  /**
   * One step. @throws KraitError when `max_skipped` steps in a row had a loss that is not finite;
   * ExpertOverflow when experts had no room for a step's tokens: the run then stands where it stood before.
   */
  async step(): Promise<RunStep> {
    const { accumulate, batch, seqlen } = this.recipe;
    const start = performance.now();
    const before = this.packer.state;
    const metrics = await this.#onward(before, () =>
      this.trainer.step(Array.from({ length: accumulate }, () => this.packer.next())));
    this.done++;
    const tokens = accumulate * batch * seqlen;
    return {
      ...metrics, tokens: (metrics.step + 1) * tokens,
      tokens_per_s: (1000 * tokens) / (performance.now() - start),
    };
  }

  async #onward<T>(before: PackingState, body: () => Promise<T>): Promise<T> {
    try {
      return await body();
    } catch (error) {
      if (error instanceof ExpertOverflow) this.packer.restore(before);
      throw error;
    }
  }

  /** Loss on the validation text: `eval_rows` rows spread over it, or all of it. */
  async evaluate(rows = this.recipe.eval_rows): Promise<Evaluation> {
    const batches = this.#validationPacker.sequential(rows > 0 ? rows : undefined);
    const loss = await this.trainer.evaluate(batches);
    return { loss, bits_per_byte: bitsPerByte(loss, this.validation) };
  }

  dispose(): void {
    this.trainer.dispose();
  }
}
