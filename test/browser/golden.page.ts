import { memoryFolder } from "../../src/io/files.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { checkGoldenCase, type GoldenResult } from "../model/golden.ts";

/** Runs golden cases on the page's adapter, one device for all. `cases` holds the file names of each. */
export default async function golden(cases: Record<string, string[]>): Promise<Record<string, GoldenResult>> {
  const device = await openDevice();
  const results: Record<string, GoldenResult> = {};
  for (const [name, names] of Object.entries(cases)) {
    const files: Record<string, Uint8Array> = {};
    for (const file of names) {
      const response = await fetch(`/test/fixtures/golden/${name}/${file}`);
      if (!response.ok) throw new Error(`${name}/${file}: HTTP status ${response.status}`);
      files[file] = new Uint8Array(await response.arrayBuffer());
    }
    results[name] = await checkGoldenCase(device, memoryFolder(name, files));
  }
  device.destroy();
  return results;
}
