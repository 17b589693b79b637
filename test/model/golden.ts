/**
 * Checks a model directory with golden tensors from an independent implementation: logits, losses, hidden
 * states, router choices, caches, incremental decode and the gradient of every parameter. Knows nothing of
 * the test runner.
 */
import type { Folder } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { gradientEntries, loadModel } from "../../src/models/checkpoint.ts";
import { parseConfig } from "../../src/models/config.ts";
import {
  evaluate, evaluateIncremental, type EvaluateInputs, type Outputs,
} from "../../src/models/evaluate.ts";
import type { Device } from "../../src/tensor/device.ts";

/** Allowed error relative to the largest entry of a tensor. */
export const GOLDEN_TOLERANCE = 1e-4;

export interface GoldenResult {
  /** Tensors compared. */
  readonly compared: number;
  readonly worst: { readonly name: string; readonly error: number };
  readonly failures: readonly string[];
}

/** Runs one case. `folder` holds config.json, the checkpoint and golden.safetensors. */
export async function checkGoldenCase(device: Device, folder: Folder): Promise<GoldenResult> {
  const read = async (file: string) => {
    const source = await folder.open(file);
    if (!source) throw new Error(`${folder.name} holds no ${file}`);
    return source;
  };
  const configSource = await read("config.json");
  const configText = await configSource.read(0, configSource.size);
  await configSource.close();
  const golden = await openSafetensors(await read("golden.safetensors"));
  const names = [...golden.tensors.keys()];
  const [batch, seqlen] = golden.info("input_ids").shape as [number, number];
  const optional = async (name: string) => names.includes(name) ? golden.readTensorI32(name) : undefined;
  const inputs: EvaluateInputs = {
    batch, seqlen, input_ids: await golden.readTensorI32("input_ids"), labels: await optional("labels"),
    attention_mask: await optional("attention_mask"), cu_seqlens: await optional("cu_seqlens"),
  };
  const before = device.pool.liveBytes;
  const failures: string[] = [];
  let compared = 0;
  let worst = { name: "", error: 0 };
  /** One expected tensor against one found, at the positions that count. */
  const compare = (
    label: string, found: ArrayLike<number> | undefined, expected: ArrayLike<number>,
    counts: (i: number) => boolean,
  ) => {
    compared++;
    if (!found || found.length !== expected.length) {
      failures.push(`${label}: expected ${expected.length} values, found ${found?.length ?? "none"}`);
      return;
    }
    let largest = 0;
    let error = 0;
    for (let i = 0; i < expected.length; i++) {
      if (!counts(i)) continue;
      largest = Math.max(largest, Math.abs(expected[i]!));
      const difference = Math.abs(found[i]! - expected[i]!);
      error = difference <= error ? error : difference; // NaN is kept
    }
    const relative = largest === 0 ? error : error / largest;
    if (!(relative <= worst.error)) worst = { name: label, error: relative };
    if (!(relative <= GOLDEN_TOLERANCE)) {
      failures.push(`${label}: error ${relative.toExponential(2)} of the largest entry`);
    }
  };
  /** Padding rows hold whatever the other implementation produced. */
  const mask = inputs.attention_mask;
  const visible = (rows: number, width: number) =>
    (i: number) => !mask || rows !== batch * seqlen || mask[Math.floor(i / width)] !== 0;

  const compareAll = async (outputs: Outputs, prefix = "") => {
    for (const [name, { data, shape, dtype }] of outputs) {
      const goldenName = prefix + name;
      if (!names.includes(goldenName)) continue;
      const expected = dtype === "I32"
        ? await golden.readTensorI32(goldenName)
        : await golden.readTensorF32(goldenName);
      const rows = name.startsWith("router.") ? shape[0]! : shape.length === 3 ? shape[0]! * shape[1]! : -1;
      const width = rows > 0
        ? expected.length / (name.startsWith("router.mtp") ? batch * (seqlen - 1) : rows)
        : 1;
      // The MTP head runs on one row more than the golden tensors show.
      const found = name.startsWith("router.mtp") ? dropLastRows(data, batch, seqlen, width) : data;
      if (dtype === "I32") {
        compared++;
        const wrong = Array.from(expected)
          .findIndex((value, i) => visible(rows, width)(i) && found[i] !== value);
        if (wrong >= 0) {
          failures.push(
            `${goldenName}: row ${Math.floor(wrong / width)} chose ${found[wrong]}, ` +
            `expected ${expected[wrong]}`);
        }
      } else {
        compare(goldenName, found, expected, visible(rows, width));
      }
    }
  };

  const variants = names.includes("noclamp.logits") ? [true, false] : [false];
  for (const clamp of variants) {
    const config = parseConfig(configText, { dt_min_clamp: clamp });
    const model = await loadModel(device, config, folder, true);
    const outputs = await evaluate(model, inputs, { grads: true, internals: true });
    const entries = new Map(gradientEntries(config, outputs));
    // The case with two readings of the step's lower bound: plain names carry the bounded one.
    const noclamp = variants.length > 1 && !clamp;
    await compareAll(entries, noclamp ? "noclamp." : "");
    if (!noclamp) {
      for (const name of names) {
        const isOutput = /^(logits|loss|grad\..*|hidden_states\..*|router\..*|mtp\..*)$/.test(name);
        if (isOutput && !entries.has(name)) failures.push(`${name}: was not computed`);
      }
    }
    if (names.includes("decode.logits")) {
      const prefill = (await golden.readTensorI32("decode.prefill_len"))[0]!;
      const { logits, caches } = await evaluateIncremental(model, inputs, [prefill]);
      compare("decode.logits", logits, await golden.readTensorF32("decode.logits"), () => true);
      await compareAll(caches);
    }
    if (names.includes("decode.chunked_logits")) {
      const pieces = Array.from(await golden.readTensorI32("decode.chunk_lens"));
      const { logits, caches } = await evaluateIncremental(model, inputs, pieces);
      compare(
        "decode.chunked_logits", logits, await golden.readTensorF32("decode.chunked_logits"), () => true);
      await compareAll(caches);
    }
    model.dispose();
  }
  await golden.close();
  if (device.pool.liveBytes !== before) {
    failures.push(`${device.pool.liveBytes - before} bytes are still live afterwards`);
  }
  return { compared, worst, failures };
}

function dropLastRows<A extends ArrayLike<number>>(
  data: A, batch: number, seqlen: number, width: number,
): number[] {
  const kept: number[] = [];
  for (let b = 0; b < batch; b++) {
    for (let i = b * seqlen * width; i < (b * seqlen + seqlen - 1) * width; i++) kept.push(data[i]!);
  }
  return kept;
}
