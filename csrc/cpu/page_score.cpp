// Quest's bound: the positive channels of a query meet the largest keys of a page, the negative ones the smallest. That is one dot
// product of twice the channels.
#include "row_scan.h"

namespace SA_NAMESPACE {
namespace {

template <class E>
class Ends {
  using Storage = typename E::Storage;

 public:
  using Element = E;
  static constexpr int kParts = 2;

  Ends(const Rows& low, const Rows& high) : low_(low), high_(high) {}

  int64_t width() const { return low_.width; }
  static SA_INLINE void split(F32 x, F32* parts) {
    parts[0] = x < 0.0f ? F32{} : x;
    parts[1] = x > 0.0f ? F32{} : x;
  }
  void stage(int64_t page, int) {
    low_at_ = static_cast<const Storage*>(low_.data) + page * low_.stride;
    high_at_ = static_cast<const Storage*>(high_.data) + page * high_.stride;
  }
  SA_INLINE void load(int64_t i, int64_t channel, F32* parts) const {
    parts[0] = E::load(high_at_ + i * high_.stride + channel);
    parts[1] = E::load(low_at_ + i * low_.stride + channel);
  }

 private:
  const Rows low_, high_;
  const Storage *low_at_ = nullptr, *high_at_ = nullptr;
};

}  // namespace

void page_score(const PageScore& args, const Parallel& parallel) {
  const std::vector<TokenRun> runs = token_runs(args.runs, args.q, args.low.count);
  std::fill(args.out, args.out + args.low.count, 0.0f);
  with_element(args.q.dtype, [&](auto element) {
    using Element = decltype(element);
    with_panel(args.q.size[1] / args.runs.kv_heads * args.q.size[2], [&](auto panel) {
      const int64_t bytes = 2 * args.low.width * sizeof(typename Element::Storage);
      scan_largest<Ends<Element>, panel>(args.q, args.runs, runs, 1.0f, {args.low, args.high}, bytes, args.reduce, args.out,
                                         parallel);
    });
  });
}

}  // namespace SA_NAMESPACE
