/** Forward and backward passes of micro-batches through the stages of a model. */
import { forRank } from "../gpu/lane.ts";
import { type GradientMap, Tape } from "../autograd/tape.ts";
import { type Loss, type LossOptions, trainingContext } from "../models/nemotron_h.ts";
import type { Routing } from "../nn/context.ts";
import { accumulate } from "../ops/elementwise.ts";
import { ranksPerStage } from "../parallel/mesh.ts";
import type { MeshModel } from "../parallel/model.ts";
import { scope } from "../tensor/scope.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { StageInputs } from "./rank_inputs.ts";

/** What a forward pass of a stage found: losses where it has the head, routing of its layers. */
export interface StagePass {
  readonly stage: number;
  readonly main: Tensor | null;
  readonly mtp: readonly Tensor[];
  readonly aux: Tensor | null;
  readonly routing: readonly Routing[];
}

/** A micro-batch in a stage between its passes. */
interface Alive {
  readonly tape: Tape;
  /** What came from the stage before: hidden states, of deeper predictions too behind their layers. */
  readonly entries: readonly Tensor[];
  /** Whose gradients are known when the backward pass begins, and these. */
  readonly outputs: Tensor[];
  readonly seeds: Tensor[];
  /** What the next stage goes on from. */
  readonly exits: readonly Tensor[];
  /** Its stage's place in the pipeline, and what it holds there. */
  readonly rank: number;
  bytes: number;
}

/** Bytes between passes at every place in a pipeline, on all ranks of a stage together. */
class Held {
  readonly #now: number[];
  readonly #peaks: number[];

  constructor(places: number) {
    this.#now = Array<number>(places).fill(0);
    this.#peaks = [...this.#now];
  }

  /** The most at one time. */
  get peaks(): readonly number[] {
    return this.#peaks;
  }

  add(place: number, bytes: number): void {
    this.#now[place]! += bytes;
    this.#peaks[place] = Math.max(this.#peaks[place]!, this.#now[place]!);
  }
}

/**
 * The passes of one step. Between stages activations go forth and their gradients back; what lies in between
 * lives from a stage's forward pass to its backward pass.
 */
export class Passes {
  readonly #mesh: MeshModel;
  readonly #options: LossOptions;
  readonly #held: Held;
  readonly #alive = new Map<string, Alive>();
  /** Activations and gradients that wait for the stage they were sent to. */
  readonly #sent = new Map<string, readonly Tensor[]>();

  constructor(mesh: MeshModel, options: LossOptions) {
    this.#mesh = mesh;
    this.#options = options;
    this.#held = new Held(mesh.layout.pp);
  }

  /**
   * Bytes that forward passes left for backward passes, the most at one time, of one rank at every place in
   * the pipeline; all ranks of a stage hold as much.
   */
  get activations(): readonly number[] {
    return this.#held.peaks.map((bytes) => bytes / ranksPerStage(this.#mesh.layout));
  }

  /**
   * Runs a micro-batch forwards through a stage and sends the result on.
   * @param visit sees what was found, while it is in memory
   */
  forward(stage: number, micro: number, inputs: StageInputs, visit: (pass: StagePass) => void): void {
    const key = `${stage} ${micro}`;
    const tape = new Tape();
    const entries = stage > 0 ? this.#take(`forth ${key}`) : [];
    const { rank } = this.#mesh.stages[stage]!;
    const before = this.#liveBytes() - bytesOf(entries);
    let sent = 0;
    this.#alive.set(key, { tape, entries, exits: [], outputs: [], seeds: [], rank, bytes: 0 });
    this.#mesh.onStage(stage, `forward ${micro}`, () => scope(() => {
      const { loss, exits } = tape.run(() => this.#run(stage, inputs, entries));
      const { seeds } = inputs;
      const pairs: [Tensor | null, Tensor][] =
        [[loss.main, seeds.main], ...loss.mtp.map((one, i): [Tensor, Tensor] => [one, seeds.mtp[i]!]),
          [loss.aux, seeds.aux]];
      const known = pairs.filter((pair): pair is [Tensor, Tensor] => pair[0] !== null);
      this.#alive.set(key, {
        tape, entries, exits, outputs: known.map(([output]) => output), seeds: known.map(([, seed]) => seed),
        rank, bytes: 0,
      });
      if (exits.length > 0) sent = this.#send(`forth ${stage + 1} ${micro}`, exits, stage, stage + 1);
      visit({ stage, ...loss });
    }));
    for (const entry of entries) entry.release(); // the tape keeps what it needs
    const alive = this.#alive.get(key)!;
    alive.bytes = this.#liveBytes() - sent - before;
    this.#held.add(rank, alive.bytes);
  }

  /** @param places as for `Tape.backward` */
  backward(stage: number, micro: number, places?: GradientMap): GradientMap {
    return this.#mesh.onStage(stage, `backward ${micro}`, () => this.#backward(stage, micro, places));
  }

  #backward(stage: number, micro: number, places?: GradientMap): GradientMap {
    const key = `${stage} ${micro}`;
    const { tape, entries, exits, outputs, seeds, rank, bytes } = this.#alive.get(key)!;
    this.#alive.delete(key);
    this.#held.add(rank, -bytes);
    const after = exits.length > 0 ? this.#take(`back ${key}`) : [];
    try {
      const gradients = tape.backward(
        [...outputs, ...exits].flatMap(localsOf), [...seeds, ...after].flatMap(localsOf), places);
      if (entries.length > 0) {
        scope(() => {
          const back = entries.map((entry) => localsOf(entry).map(({ key: leaf, shape, device }) => {
            const gradient = gradients.get(leaf);
            gradients.delete(leaf);
            return gradient ?? device.zeros(shape).retain();
          }));
          this.#send(`back ${stage - 1} ${micro}`, back.map((locals) => shardedOf(locals)), stage, stage - 1);
          for (const gradient of back.flat()) gradient.release();
        });
      }
      return gradients;
    } finally {
      tape.dispose();
      for (const gradient of after) gradient.release();
    }
  }

  /** Runs a micro-batch through all stages without gradients; the last one's losses. */
  evaluate(inputs: readonly StageInputs[]): StagePass {
    let found: StagePass | null = null;
    let entries: readonly Tensor[] = [];
    for (let stage = 0; stage < inputs.length; stage++) {
      const { loss, exits } = this.#run(stage, inputs[stage]!, entries);
      found = { stage, ...loss };
      entries = exits.map((exit) => this.#mesh.sendTo(exit, stage, stage + 1));
    }
    return found!;
  }

  /** Gives back what a step that failed has left. */
  dispose(): void {
    for (const { tape } of this.#alive.values()) tape.dispose();
    for (const tensor of [...this.#sent.values()].flat()) tensor.release();
    this.#alive.clear();
    this.#sent.clear();
  }

  #run(
    stage: number, inputs: StageInputs, entries: readonly Tensor[],
  ): { loss: Omit<StagePass, "stage">; exits: Tensor[] } {
    const { model } = this.#mesh.stages[stage]!;
    const context = trainingContext(inputs, this.#options);
    const routing = context.routing!;
    const [entry, ...deeper] = entries;
    const x = model.part.embedding ? model.embed(inputs.input_ids) : entry!;
    const y = model.run(x, context);
    if (model.part.head) {
      const states = deeper.length > 0 ? deeper : undefined;
      const { main, mtp, aux }: Loss = model.lossFrom(y, inputs, this.#options, context, states);
      return { loss: { main, mtp, aux, routing }, exits: [] };
    }
    const backbone = routing.length;
    const exits = [y];
    // Prediction layers apart from the head: the states of all depths go on to it.
    if (model.part.mtp) {
      for (const { input_ids } of inputs.mtp) exits.push(model.mtpHidden(exits.at(-1)!, input_ids, context));
    }
    const share = 1 / inputs.mtp.length;
    const weighed = routing.map((one, i) => ({ ...one, share: i < backbone ? 1 : share }));
    const aux = model.auxLoss(weighed, inputs, this.#options);
    return { loss: { main: null, mtp: [], aux, routing }, exits };
  }

  #liveBytes(): number {
    return this.#mesh.devices.reduce((sum, { pool }) => sum + pool.liveBytes, 0);
  }

  /** @returns bytes of what was not in memory before */
  #send(key: string, xs: readonly Tensor[], from: number, stage: number): number {
    const arrived = xs.map((x) => this.#mesh.sendTo(x, from, stage).retain());
    for (const local of arrived.flatMap(localsOf)) local.requiresGrad = key.startsWith("forth");
    this.#sent.set(key, arrived);
    const known = new Set(xs.flatMap(localsOf).map(({ storage }) => storage));
    return bytesOf(arrived.flatMap(localsOf).filter(({ storage }) => !known.has(storage)));
  }

  #take(key: string): readonly Tensor[] {
    const tensors = this.#sent.get(key);
    if (!tensors) throw new Error(`A pass came before what it goes on from: ${key}.`);
    this.#sent.delete(key);
    return tensors;
  }
}

function bytesOf(tensors: readonly Tensor[]): number {
  return tensors.flatMap(localsOf).reduce((sum, { storage }) => sum + storage.size, 0);
}

/**
 * Adds gradients to sums in their places.
 * @param ranks whose places these are, by the same keys
 */
export function addGradients(
  places: GradientMap, gradients: GradientMap, ranks: ReadonlyMap<number, number>,
): void {
  for (const [key, sum] of places) {
    const gradient = gradients.get(key);
    if (gradient) forRank(ranks.get(key)!, () => accumulate(sum, gradient.reshape(sum.shape)));
  }
}
