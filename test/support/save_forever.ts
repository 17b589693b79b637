/** Saves checkpoint after checkpoint into the folder given, until it is killed. */
import { saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import { localFileLayer } from "../../src/io/files.node.ts";

const [root, first] = process.argv.slice(2) as [string, string];
for (let step = Number(first); ; step++) {
  const bytes = new Uint8Array(200_000).fill(step % 251);
  const files = { "weights.bin": bytes, "state.json": `{"step":${step}}` };
  await saveCheckpoint(localFileLayer(), root, step, files, { keep: 2 });
  process.stdout.write(`${step}\n`);
}
