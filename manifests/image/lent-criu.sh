# Makes FOLDER the private CRIU that agents lend: the one in the context, or one from Debian's packages.
#   sh lent-criu.sh FOLDER
set -eu
folder=$1

mkdir -p "$(dirname "$folder")"
case $CRIU in
true) ;;
*) mkdir "$folder" && exit 0 ;; # agents say that there is none
esac
if [ -e criu/criu ]; then
    rm criu/install-criu.sh criu/debian.sh
    mv criu "$folder"
else
    sh criu/install-criu.sh "$folder"
fi
"$folder/criu" --version
# What only building with CRIU needs.
find "$folder" -name '*.a' -delete
find /layer -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
