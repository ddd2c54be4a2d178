// Validates custom resources by the models of @kubernetes-models, which were made of their projects'
// CRDs: documents as JSON from standard input, a list of problems for each to standard output.
//
// The models check types and what is required, and ask for every field that they know. So a field that
// is there and was never asked for, in an object of which others were, is one that the CRD doesn't know.

const PACKAGES = {
  "monitoring.coreos.com": "prometheus-operator",
  "keda.sh": "keda",
  "gateway.networking.k8s.io": "gateway-api",
  "argoproj.io": "argo-rollouts",
};

function watched(value, path, seen) {
  if (value === null || typeof value !== "object") return value;
  const held = Array.isArray(value) ? [] : {};
  for (const [key, inner] of Object.entries(value)) held[key] = watched(inner, `${path}/${key}`, seen);
  if (Array.isArray(value)) return held;
  const entry = { path, keys: Object.keys(value), asked: new Set(), iterated: false };
  seen.push(entry);
  return new Proxy(held, {
    get(target, key) {
      entry.asked.add(key);
      return target[key];
    },
    ownKeys(target) {
      entry.iterated = true; // a mapping whose keys are free
      return Reflect.ownKeys(target);
    },
  });
}

async function problems(document) {
  const { apiVersion, kind, metadata, ...rest } = document;
  // metadata is Kubernetes' own, and judged by its schemas elsewhere.
  const name = PACKAGES[apiVersion.split("/")[0]];
  const models = await import(`@kubernetes-models/${name}/${apiVersion}`);
  if (!(kind in models)) return [`${apiVersion} ${kind}: unknown`];
  const seen = [];
  const found = [];
  const model = new models[kind]({ metadata }); // copies what it is given, so the rest comes later
  for (const [key, value] of Object.entries(rest)) model[key] = watched(value, `/${key}`, seen);
  try {
    model.validate();
  } catch (error) {
    found.push(error.message);
  }
  for (const { path, keys, asked, iterated } of seen) {
    if (iterated || !keys.some((key) => asked.has(key))) continue;
    found.push(...keys.filter((key) => !asked.has(key)).map((key) => `${path}/${key}: unknown`));
  }
  return found;
}

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const documents = JSON.parse(Buffer.concat(chunks).toString());
const answers = [];
for (const document of documents) answers.push(await problems(document));
process.stdout.write(JSON.stringify(answers));
