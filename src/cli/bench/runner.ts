/** What the suites share: one device, its ceilings, how time is taken, where the lines go. */
import { median, sortedTimes } from "../../gpu/measure.ts";
import type { WeightFormat } from "../../models/parameters.ts";
import type { Device } from "../../tensor/device.ts";
import { scope } from "../../tensor/scope.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import { Ceilings } from "./ceilings.ts";
import type { Measured } from "./line.ts";

/** A sample repeats short work until it lasts about so long: clocks and waits cost tens of microseconds. */
const SAMPLE_MS = 20;
/** Slow work gets fewer runs than asked for, but at least three. */
const CASE_MS = 12_000;

export interface BenchOptions {
  readonly runs: number;
  /** Parts of case names; empty: all cases. */
  readonly cases: readonly string[];
  /** Preset, config file or model folder of the suites that run a model. */
  readonly config: string;
  readonly data: readonly string[];
  /** Format of the matrices in the generate suite. */
  readonly weights: WeightFormat;
  /** Rows and positions of the layouts suite's larger model. */
  readonly batch: number;
  readonly seqlen: number;
}

export interface Output {
  line(measured: Measured, ceiling: number | null): void;
  /** The case that is being measured now. */
  working(suite: string, name: string): void;
}

function scoped(body: () => unknown): () => void {
  return () => scope(() => {
    body();
  });
}

export class Bench {
  readonly device: Device;
  readonly options: BenchOptions;
  readonly ceilings: Ceilings;
  readonly #output: Output;
  readonly #made: { dispose(): void }[] = [];

  constructor(device: Device, options: BenchOptions, output: Output) {
    this.device = device;
    this.options = options;
    this.#output = output;
    this.ceilings = new Ceilings(this);
  }

  /** Whether a case was asked for; says that it is being measured. */
  wants(suite: string, name: string): boolean {
    const { cases } = this.options;
    const wanted = cases.length === 0 || cases.some((part) => name.includes(part));
    if (wanted) this.working(suite, name);
    return wanted;
  }

  working(suite: string, name: string): void {
    this.#output.working(suite, name);
  }

  async add(measured: Measured): Promise<void> {
    const ceiling = measured.bound ? await this.ceilings.of(measured.bound.by) : null;
    this.#output.line(measured, ceiling);
  }

  /**
   * Milliseconds of one call of `body`, by run, the smallest first. Compiles before. The tensors that `body`
   * makes are freed.
   */
  async time(body: () => unknown, runs = this.options.runs): Promise<number[]> {
    const work = scoped(body);
    const { repeat, count } = await this.#warmUp(work, runs);
    const times = await sortedTimes(count, () => {
      for (let i = 0; i < repeat; i++) work();
    }, () => this.device.finish());
    return times.map((ms) => ms / repeat);
  }

  /**
   * The same for two pieces of work, in turns, so that both meet the same machine.
   * @returns the times of `a`, those of `b`, and the median over the turns of a's time to b's
   */
  async timePair(
    a: () => unknown, b: () => unknown,
  ): Promise<{ times: number[]; other: number[]; ratio: number }> {
    const works = [scoped(a), scoped(b)];
    const plans: { repeat: number; count: number }[] = [];
    for (const work of works) plans.push(await this.#warmUp(work, this.options.runs));
    const times: [number[], number[]] = [[], []];
    for (let run = 0; run < Math.min(...plans.map(({ count }) => count)); run++) {
      for (const i of [0, 1] as const) {
        const start = performance.now();
        for (let n = 0; n < plans[i]!.repeat; n++) works[i]!();
        await this.device.finish();
        times[i].push((performance.now() - start) / plans[i]!.repeat);
      }
    }
    const ratios = times[0].map((ms, i) => ms / times[1][i]!);
    for (const list of [...times, ratios]) list.sort((x, y) => x - y);
    return { times: times[0], other: times[1], ratio: median(ratios) };
  }

  async #warmUp(work: () => void, runs: number): Promise<{ repeat: number; count: number }> {
    work();
    await this.device.finish();
    const start = performance.now();
    work();
    await this.device.finish();
    const ms = Math.max(performance.now() - start, 1e-3);
    return {
      repeat: Math.max(1, Math.min(200, Math.round(SAMPLE_MS / ms))),
      count: Math.max(Math.min(3, runs), Math.min(runs, Math.floor(CASE_MS / ms))),
    };
  }

  /** A tensor of small values that differ; freed by `freeTensors`. */
  tensor(shape: readonly number[]): Tensor {
    const count = shape.reduce((a, b) => a * b, 1);
    const values = Float32Array.from({ length: count }, (_, i) => Math.sin(i) / 8);
    return this.own(this.device.tensor(values, shape));
  }

  /** Keeps a tensor (or what is made of some) until `freeTensors`. */
  own<T extends { dispose(): void }>(tensor: T): T {
    this.#made.push(tensor);
    return tensor;
  }

  /** Frees the tensors made so far. */
  freeTensors(): void {
    for (const tensor of this.#made.splice(0)) tensor.dispose();
  }
}
