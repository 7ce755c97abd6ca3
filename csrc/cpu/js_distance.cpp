// Jensen-Shannon distance of pairs of rows, in double. Rows are as long as a head has blocks: nothing here needs to be fast.
#include <cmath>

#include "../ops.h"

namespace SA_NAMESPACE {
namespace {

// x log(x / m), and 0 for x = 0
double term(double x, double m) { return x == 0 && m == m ? 0 : x * std::log(x / m); }

float distance(const JsDistance& a, int64_t b, int64_t h) {
  double sum = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    const double p = a.p.at(b, h, i), q = a.q.at(b, h, i), m = (p + q) / 2;
    sum += term(p, m) + term(q, m);
  }
  // equal rows may come out just below 0; a NaN stays a NaN
  return static_cast<float>(std::sqrt((sum < 0 ? 0 : sum) / 2));
}

}  // namespace

void js_distance(const JsDistance& args, const Parallel& parallel) {
  parallel_tasks(parallel, args.batch * args.heads, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(&task);) args.out[task] = distance(args, task / args.heads, task % args.heads);
  });
}

}  // namespace SA_NAMESPACE
