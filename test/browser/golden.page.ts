import { urlFolder } from "../../src/io/files.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { checkGoldenCase, type GoldenResult } from "../model/golden.ts";

/** Runs golden cases, read over HTTP, on the page's adapter. */
export default async function golden(cases: string[]): Promise<Record<string, GoldenResult>> {
  const device = await openDevice();
  const results: Record<string, GoldenResult> = {};
  for (const name of cases) {
    const folder = urlFolder(new URL(`/test/fixtures/golden/${name}/`, location.href).href);
    results[name] = await checkGoldenCase(device, folder);
  }
  device.destroy();
  return results;
}
