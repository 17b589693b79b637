/** `npm run golden`: the worst error of every golden case on every adapter found, as a table. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { table } from "../../src/cli/terminal.ts";
import { openFolder } from "../../src/io/files.node.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkGoldenCase } from "./golden.ts";

const root = process.argv[2] ?? fileURLToPath(new URL("../fixtures/golden", import.meta.url));
const cases = readdirSync(root, { withFileTypes: true }).filter((entry) => entry.isDirectory()).map(
  ({ name }) => name).sort();
const rows: string[][] = [];
for (const handle of await testAdapters()) {
  const device = await openDevice({ adapter: handle });
  for (const name of cases) {
    const { compared, worst, failures } = await checkGoldenCase(device, openFolder(join(root, name)));
    if (failures.length > 0) process.exitCode = 1;
    rows.push([
      ` ${handle.info.id}`, name, `${compared} tensors`, `worst ${worst.error.toExponential(1)}`, worst.name,
      failures.length > 0 ? `${failures.length} FAILED: ${failures[0]}` : "",
    ]);
  }
  device.destroy();
}
process.stdout.write(`${table(rows)}\n`);
