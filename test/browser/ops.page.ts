import { openDevice } from "../../src/tensor/device.ts";
import { checkError, checkSample, type OpSamples, samplesOn } from "../ops/suite.ts";

export interface OpsResult {
  readonly adapter: string;
  /** Samples and refused calls that were run. */
  readonly samples: number;
  readonly refusals: number;
  readonly failures: readonly string[];
}

type Samples = { default: OpSamples | OpSamples[] };
const modules = import.meta.glob<Samples>("../ops/*.samples.ts", { eager: true });

/** Runs every sample of every op on the page's adapter, one device for all. */
export default async function ops(): Promise<OpsResult> {
  const device = await openDevice();
  const failures: string[] = [];
  let [samples, refusals] = [0, 0];
  const attempt = async (check: () => Promise<void> | void) => {
    try {
      await check();
    } catch (error) {
      failures.push(error instanceof Error ? error.message : String(error));
    }
  };
  for (const spec of Object.values(modules).flatMap((module) => module.default)) {
    for (const sample of samplesOn(device.info.id, spec)) {
      samples++;
      await attempt(() => checkSample(device, spec, sample));
    }
    for (const error of spec.errors ?? []) {
      refusals++;
      await attempt(() => checkError(device, spec, error));
    }
  }
  device.destroy();
  return { adapter: device.info.id, samples, refusals, failures };
}
