import { readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, describe, expect, test } from "vitest";
import { openFolder } from "../../src/io/files.node.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { loadModel } from "../../src/models/checkpoint.ts";
import { parseConfig } from "../../src/models/config.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { parseRecompute } from "../../src/nn/recompute.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { type Batch, BatchPacker, IGNORED } from "../../src/train/packing.ts";
import { constantSchedule } from "../../src/train/schedule.ts";
import { type StepMetrics, Trainer, type TrainerOptions } from "../../src/train/trainer.ts";
import { Draw } from "../ops/suite.ts";
import { bitsOf } from "../support/state.ts";
import { testAdapters } from "../support/adapters.ts";
import { failEveryAllocation } from "../support/failing_allocator.ts";

const root = fileURLToPath(new URL("../fixtures/golden", import.meta.url));
const withTraining = readdirSync(root).filter((name) => readdirSync(join(root, name)).includes("train.json"));

/** The adapter's arithmetic is tested op by op; one adapter is enough for what a trainer adds. */
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

/** A training run of another implementation, on one batch that it repeats. */
interface GoldenRun {
  readonly steps: number;
  readonly lr: number;
  readonly betas: [number, number];
  readonly eps: number;
  readonly weight_decay: number;
  readonly clip_grad_norm: number;
  /** Before every update, and after the last. */
  readonly loss_f64: number[];
  readonly grad_norm_f64: number[];
}

const PLAIN = { accumulate: 1, mtp_depths: 0, mtp_scale: 0, aux_coeff: 0, bias_rate: 0 } as const;

async function readText(folder: ReturnType<typeof openFolder>, file: string): Promise<string> {
  const source = (await folder.open(file))!;
  const bytes = await source.read(0, source.size);
  await source.close();
  return new TextDecoder().decode(bytes);
}

describe("the losses of another implementation of AdamW on one batch", () => {
  test("there are such runs", () => expect(withTraining.length).toBeGreaterThanOrEqual(3));

  for (const name of withTraining) {
    test(name, async () => {
      const folder = openFolder(join(root, name));
      const golden = await openSafetensors((await folder.open("golden.safetensors"))!);
      const [rows, seqlen] = golden.info("input_ids").shape as [number, number];
      const input_ids = await golden.readTensorI32("input_ids");
      const unshifted = await golden.readTensorI32("labels");
      await golden.close();
      const labels = unshifted.map((_, i) => (i + 1) % seqlen === 0 ? IGNORED : unshifted[i + 1]!);
      const scored = labels.filter((label) => label !== IGNORED).length;
      const batch: Batch = {
        batch: rows, seqlen, input_ids, labels, scored, ids: new Int32Array(),
        seq_idx: new Int32Array(rows * seqlen),
      };
      const run = JSON.parse(await readText(folder, "train.json")) as GoldenRun;
      const before = device.pool.liveBytes;
      const model = await loadModel(device, parseConfig(await readText(folder, "config.json")), folder, true);
      const trainer = new Trainer(model, {
        ...PLAIN, batch: rows, seqlen, schedule: constantSchedule({ peak: run.lr }), betas: run.betas,
        eps: run.eps, weight_decay: run.weight_decay, clip: run.clip_grad_norm, decays: () => true,
      });
      const steps: StepMetrics[] = [];
      for (let i = 0; i < run.steps; i++) steps.push(await trainer.step([batch]));
      const losses = [...steps.map(({ loss }) => loss), await trainer.evaluate([batch])];
      const norms = steps.map(({ grad_norm }) => grad_norm);
      for (const [found, expected] of [[losses, run.loss_f64], [norms, run.grad_norm_f64]] as const) {
        expect(found.length).toBe(expected.length);
        found.forEach((value, i) => {
          expect(Math.abs(value / expected[i]! - 1), `step ${i}: ${value}`).toBeLessThan(1e-4);
        });
      }
      trainer.dispose();
      model.dispose();
      expect(device.pool.liveBytes).toBe(before);
    });
  }
});

/** The first row of a batch. */
function firstRow({ seqlen, ids, input_ids, labels, seq_idx }: Batch): Batch {
  const [row, own] = [(values: Int32Array) => values.slice(0, seqlen), labels.slice(0, seqlen)];
  return {
    batch: 1, seqlen, ids: ids.slice(0, seqlen + 1), input_ids: row(input_ids), labels: own,
    seq_idx: row(seq_idx), scored: own.filter((label) => label !== IGNORED).length,
  };
}

describe("a small model with experts and two prediction depths", () => {
  const config = preset("unit");
  const r = new Draw(11);
  const tokens = Int32Array.from(r.integers([400], 0, config.vocab_size).data);
  const corpus = { tokens, starts: Int32Array.from([0, 50, 130, 290]), bytes: 400, scored: 396, eosId: 2 };
  const options: TrainerOptions = {
    ...PLAIN, batch: 2, seqlen: 12, schedule: constantSchedule({ peak: 3e-3, warmup: 2 }), betas: [0.9, 0.95],
    eps: 1e-8, weight_decay: 0.1, clip: 1, mtp_depths: 2, mtp_scale: 0.3, aux_coeff: 1e-2, bias_rate: 1e-2,
  };
  const start = (changes: Partial<TrainerOptions> = {}, seed = 1) => {
    const model = new NemotronH(config, createParameters(device, config, seed));
    const trainer = new Trainer(model, { ...options, ...changes });
    return {
      model, trainer,
      dispose: () => {
        trainer.dispose();
        model.dispose();
      },
    };
  };

  test("the same seed gives the same bits, another seed does not", async () => {
    const metrics = async (seed: number) => {
      const { trainer, dispose } = start({}, seed);
      const packer = new BatchPacker(corpus, { ...options, seed });
      const steps: StepMetrics[] = [];
      for (let i = 0; i < 4; i++) steps.push(await trainer.step([packer.next()]));
      dispose();
      return steps;
    };
    const first = await metrics(1);
    expect(await metrics(1)).toEqual(first);
    expect((await metrics(2)).map(({ loss }) => loss)).not.toEqual(first.map(({ loss }) => loss));
    for (const { loss, mtp_loss, aux_loss, total, max_violation } of first) {
      expect(mtp_loss).toHaveLength(2);
      const sum = loss + 0.3 * (mtp_loss[0]! + mtp_loss[1]!) / 2 + aux_loss;
      expect(Math.abs(total - sum)).toBeLessThan(1e-5);
      expect(aux_loss).toBeGreaterThan(0);
      expect(max_violation).toBeGreaterThan(0);
    }
    expect(first.map(({ lr }) => lr)).toEqual([1.5e-3, 3e-3, 3e-3, 3e-3]);
  });

  test("one batch is learnt by heart", async () => {
    const { trainer, dispose } = start({ schedule: constantSchedule({ peak: 1e-2 }) });
    const batch = new BatchPacker(corpus, options).next();
    const losses: number[] = [];
    for (let i = 0; i < 40; i++) losses.push((await trainer.step([batch])).loss);
    expect(losses[0]).toBeGreaterThan(3);
    expect(losses.at(-1)).toBeLessThan(0.3 * losses[0]!);
    dispose();
  });

  test("two micro-batches make the update of one batch with the rows of both", async () => {
    // The balancing loss and the loads depend on the division into batches; means over equal counts do not.
    const even = { ...corpus, starts: Int32Array.from([0]), scored: 399 };
    const same = { aux_coeff: 0, bias_rate: 0 };
    const run = async (batch: number, accumulate: number) => {
      const { model, trainer, dispose } = start({ ...same, batch, accumulate });
      const packer = new BatchPacker(even, { batch, seqlen: 12 });
      const steps: StepMetrics[] = [];
      for (let i = 0; i < 3; i++) {
        steps.push(await trainer.step(Array.from({ length: accumulate }, () => packer.next())));
      }
      const parameters: number[][] = [];
      for (const parameter of model.parameters.values()) parameters.push(Array.from(await parameter.read()));
      dispose();
      return { steps, parameters };
    };
    const [whole, parts] = [await run(4, 1), await run(2, 2)];
    whole.steps.forEach((step, i) => {
      for (const name of ["total", "loss", "grad_norm"] as const) {
        expect(Math.abs(parts.steps[i]![name] / step[name] - 1), `${name} of step ${i}`).toBeLessThan(2e-5);
      }
      step.mtp_loss.forEach((loss, d) => expect(parts.steps[i]!.mtp_loss[d]! / loss).toBeCloseTo(1, 4));
    });
    // AdamW turns a gradient near zero into a full step, so single weights may differ by more than rounding.
    const difference = Math.max(...whole.parameters.map((values, i) => {
      const other = parts.parameters[i]!;
      return Math.sqrt(values.reduce((sum, value, j) => sum + (value - other[j]!) ** 2, 0) / values.length);
    }));
    expect(difference).toBeLessThan(2e-4);
  });

  test("steps leave no memory, buffers or bind groups behind", async () => {
    const before = device.pool.liveBytes;
    for (const accumulate of [1, 2]) {
      const { trainer, dispose } = start({ accumulate });
      const packer = new BatchPacker(corpus, options);
      const step = () => trainer.step(Array.from({ length: accumulate }, () => packer.next()));
      const evaluation = () => trainer.evaluate(packer.sequential(2));
      await step();
      await evaluation();
      const { liveBytes, heldBytes, created } = device.pool;
      const groups = device.bindGroupsCreated;
      const others = [device.stagingCreated, device.stream.blocksCreated];
      for (let i = 0; i < 5; i++) {
        await step();
        await evaluation();
      }
      expect(device.pool).toMatchObject({ liveBytes, heldBytes, created });
      expect(device.bindGroupsCreated).toBe(groups);
      expect([device.stagingCreated, device.stream.blocksCreated]).toEqual(others);
      const { peak, live, total, tensors } = trainer.memory!;
      expect(peak).toBeLessThan(1.25 * live);
      expect(total).toBeGreaterThan(2 * live);
      expect(tensors).toBeGreaterThan(100);
      dispose();
      expect(device.pool.liveBytes).toBe(before);
    }
  });

  test("recomputing the blocks takes less memory and changes no bit", async () => {
    const shape = { batch: 2, seqlen: 160 };
    const before = device.pool.liveBytes;
    const run = async (recompute: boolean) => {
      const { model, trainer, dispose } = start(
        { ...shape, recompute: parseRecompute(recompute ? "full" : "off") });
      const packer = new BatchPacker(corpus, shape);
      device.pool.resetPeak();
      const steps: StepMetrics[] = [];
      for (let i = 0; i < 3; i++) steps.push(await trainer.step([packer.next()]));
      const peak = device.pool.peakBytes;
      const parameters: number[][] = [];
      for (const parameter of model.parameters.values()) parameters.push(Array.from(await parameter.read()));
      dispose();
      return { steps, parameters, peak };
    };
    const [plain, again] = [await run(false), await run(true)];
    expect(again.steps).toEqual(plain.steps);
    expect(again.parameters).toEqual(plain.parameters);
    expect(again.peak).toBeLessThan(0.8 * plain.peak);
    expect(device.pool.liveBytes).toBe(before);
  });

  const recomputes = ["off", "full", "layernorm,moe_act"];
  test.each(recomputes)("an allocation that fails leaves nothing behind; recompute %s", async (
    recompute) => {
    const batches = [new BatchPacker(corpus, options).next()];
    const failures = await failEveryAllocation(device, async () => {
      const model = new NemotronH(config, createParameters(device, config, 1));
      let trainer: Trainer | null = null;
      try {
        trainer = new Trainer(model, { ...options, batch: 1, recompute: parseRecompute(recompute) });
        await trainer.step(batches.map((batch) => firstRow(batch)));
      } finally {
        trainer?.dispose();
        model.dispose();
      }
    }, 23);
    expect(failures).toBeGreaterThan(10);
  });

  /** Bits of all that an update changes. */
  const stateOf = async ({ model, trainer }: ReturnType<typeof start>) => {
    const state: Uint8Array[] = [];
    for (const view of [...model.parameters.values(), ...trainer.optimizers[0]!.state]) {
      state.push(await bitsOf(view));
    }
    return state;
  };

  test.each([1, 2])("a step that meets a NaN in %d micro-batches changes nothing, and none after it", async (
    accumulate) => {
    const packer = new BatchPacker(corpus, options);
    const batches = Array.from({ length: 2 + accumulate }, () => packer.next());
    const micros = (first: number) => batches.slice(first, first + accumulate);
    // A token whose row of the table is no number, in the first micro-batch of the step alone.
    const poisoned = {
      ...batches[0]!, input_ids: batches[0]!.input_ids.with(5, 3), seq_idx: batches[0]!.seq_idx,
    };
    const row = (value: number | null, { model }: ReturnType<typeof start>) => {
      const table = model.parameters.get("backbone.embeddings.weight")!;
      const at = 3 * config.hidden_size;
      return table.read().then((values) => table.write((values as Float32Array).fill(value ?? 0.01, at,
        at + config.hidden_size)));
    };
    const [skipping, plain] = [start({ accumulate }), start({ accumulate })];
    for (const run of [skipping, plain]) await row(null, run);
    const first = await skipping.trainer.step(micros(0));
    expect(await plain.trainer.step(micros(0))).toEqual(first);
    expect(first).toMatchObject({ skipped: false, skipped_steps: 0 });

    const whole = (await skipping.model.parameters.get("backbone.embeddings.weight")!.read()).slice();
    await row(NaN, skipping);
    const before = await stateOf(skipping);
    for (const n of [1, 2]) {
      const step = await skipping.trainer.step([poisoned, ...micros(1).slice(1)]);
      expect(step).toMatchObject({ step: n, loss: NaN, grad_norm: NaN, skipped: true, skipped_steps: n });
    }
    expect(await stateOf(skipping)).toEqual(before);
    skipping.model.parameters.get("backbone.embeddings.weight")!.write(whole);
    expect(skipping.trainer.skipped).toEqual({ total: 2, in_a_row: 2 });
    const [a, b] = [await skipping.trainer.step(micros(2)), await plain.trainer.step(micros(2))];
    expect(a).toEqual({ ...b, step: 3, lr: a.lr, skipped_steps: 2 });
    expect(await stateOf(skipping)).toEqual(await stateOf(plain));
    expect(skipping.trainer.skipped).toEqual({ total: 2, in_a_row: 0 });
    skipping.dispose();
    plain.dispose();
  });

  test("steps without a finite loss end the run with a sentence when there are enough of them", async () => {
    const run = start({ max_skipped: 3 });
    const { model, trainer, dispose } = run;
    const batch = new BatchPacker(corpus, options).next();
    await trainer.step([batch]);
    const norm = (value: number) => model.norm_f.write(new Float32Array(config.hidden_size).fill(value));
    norm(NaN);
    for (let i = 0; i < 2; i++) expect((await trainer.step([batch])).skipped).toBe(true);
    norm(1);
    expect(await trainer.step([batch])).toMatchObject({ skipped: false, skipped_steps: 2 });
    norm(NaN);
    for (let i = 0; i < 2; i++) await trainer.step([batch]);
    const before = await stateOf(run);
    await expect(trainer.step([batch])).rejects.toThrow(
      /loss at step 7 is NaN .*each of the last 3 steps was skipped.*those after step 4;/);
    expect(await stateOf(run)).toEqual(before);
    await expect(trainer.step([])).rejects.toThrow(/needs 1 micro-batches, found 0/);
    dispose();
  });

  test("a gradient that overflows under a finite loss is skipped too", async () => {
    const run = start({ max_skipped: 1, mtp_depths: 0 });
    const { model, trainer, dispose } = run;
    const head = model.parameters.get("lm_head.weight")!;
    head.write((await head.read() as Float32Array).map((x) => 1e30 * x));
    model.norm_f.write(new Float32Array(config.hidden_size).fill(1e-30));
    const before = await stateOf(run);
    const batch = new BatchPacker(corpus, options).next();
    await expect(trainer.step([batch])).rejects.toThrow(
      /gradient norm at step 1 is Infinity \(loss 3\.\d+\), and such a step was skipped.*those of the start/);
    expect(await stateOf(run)).toEqual(before);
    dispose();
  });
});
